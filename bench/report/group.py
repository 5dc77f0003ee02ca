"""Boards that are read together: one row per mechanism over all of them, with the composite index.

A group holds the boards of one `task_group` and one budget, two or more. Each board is a task of the index, with its
primary metric; boards of one pattern are averaged before patterns are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from bench.report import composite
from bench.report.composite import CELL, LOGARITHMIC, PATTERNS
from bench.report.leaderboard import FLOORS, Board, safe

BASELINE = "softmax"
NOT_RUN = "not run"


class GroupKey(NamedTuple):
    """What boards of a group share."""

    group: str
    budget: str


class Column(NamedTuple):
    """A board as a column of the group's table."""

    pattern: str
    task: str  # names the board within the pattern
    label: str  # the pattern, with the task where a pattern has several
    board: Board

    @property
    def cell(self) -> tuple[str, str, str]:
        """Its cell of the composite index."""
        return self.pattern, self.task, self.board.metric


@dataclass(frozen=True)
class Group:
    """One group page.

    Args:
        columns: the boards, in the order of the patterns.
        reference: the mechanisms that z is measured against.
        constants: their mean and SD in each cell; see `composite.reference`.
        table: one row per mechanism; see `_table`.
    """

    key: GroupKey
    columns: list[Column]
    reference: list[str]
    constants: pd.DataFrame
    table: pd.DataFrame

    @property
    def patterns(self) -> list[str]:
        """In order, each once."""
        return list(dict.fromkeys(column.pattern for column in self.columns))

    @property
    def runs(self) -> pd.DataFrame:
        """The runs that count, of all boards."""
        return pd.concat([column.board.runs for column in self.columns], ignore_index=True)

    @property
    def logarithmic(self) -> list[str]:
        """Metrics of which the index takes the logarithm."""
        return _logarithmic(self.columns)


def groups(boards: Iterable[Board], reference: Sequence[str] | None = None) -> list[Group]:
    """The groups of two or more boards, ordered by key.

    Args:
        boards: of any number of groups, or of none.
        reference: names of the reference set; by default every mechanism, floors included, whose seeds all succeeded
            in every board of the group.
    """
    found: dict[GroupKey, list[Board]] = {}
    for board in boards:
        name = _fact(board, "task_group")
        if name and len(board.runs):
            found.setdefault(GroupKey(name, board.key.budget), []).append(board)
    return [_group(key, own, reference) for key, own in sorted(found.items()) if len(own) > 1]


def folder_names(keys: Iterable[GroupKey], defaults: Mapping[str, str], taken: Iterable[str]) -> dict[GroupKey, str]:
    """A folder for each group: its name, then the budget where it is not the default; none that a board has."""
    names = {}
    for key in keys:
        parts = [key.group, *([key.budget] if key.budget != defaults["budget"] else [])]
        names[key] = "-".join(map(safe, parts))
    count = Counter(name.casefold() for name in [*names.values(), *taken])
    for key, name in names.items():
        if count[name.casefold()] > 1 or len(name) > 100:
            names[key] = f"{name[:100]}-{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:8]}"
    return names


def _fact(board: Board, column: str) -> str | None:
    """What the newest run that knows says; a run that died before it began may not."""
    for runs in (board.runs, board.frames.runs):
        known = runs.dropna(subset=[column]).sort_values(["started_at", "run_id"])
        if len(known):
            return str(known[column].iloc[-1])
    return None


def _group(key: GroupKey, boards: list[Board], reference: Sequence[str] | None) -> Group:
    columns = _columns(boards)
    cells = composite.averaged(_scores(columns), _logarithmic(columns))
    if reference is None:
        whole = [
            {r["attention"] for r in _rows(column) if r["status"] == "ok" and pd.isna(r["leaks"])} for column in columns
        ]
        reference = sorted(set.intersection(*whole))
    constants = composite.reference(cells, reference)
    z = composite.standardised(cells, constants)
    return Group(key, columns, list(reference), constants, _table(columns, z, reference))


def _columns(boards: list[Board]) -> list[Column]:
    """Boards in the order of the patterns; one that does not know its pattern stands for itself, at the end."""
    several = Counter(board.key.task for board in boards)
    known = []
    for board in boards:
        task, backbone, _ = board.key
        name = task if several[task] == 1 else f"{task} · {backbone}"
        known.append((_fact(board, "pattern") or name, name, board))
    known.sort(key=lambda k: (PATTERNS.index(k[0]) if k[0] in PATTERNS else len(PATTERNS), k[0], k[1]))
    shared = Counter(pattern for pattern, _, _ in known)
    return [
        Column(pattern, name, pattern if shared[pattern] == 1 else f"{pattern}: {name}", board)
        for pattern, name, board in known
    ]


def _logarithmic(columns: list[Column]) -> list[str]:
    return sorted({c.board.metric for c in columns if c.board.metric.lower() in LOGARITHMIC})


def _rows(column: Column) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in column.board.table.to_dict("records")]


def _scores(columns: list[Column]) -> pd.DataFrame:
    """`test` of every seed that succeeded at the chosen rate, as `composite.averaged` wants it.

    What looks ahead has none. A mechanism's rank in a board is the middle of the ranks that its seeds leave possible.
    """
    parts = []
    for column in columns:
        board = column.board
        own = board.runs[board.runs["chosen"] & board.runs["good"] & board.runs["leaks"].isna()]
        table = board.table.set_index("attention")
        middle = (table["rank_best"] + table["rank_worst"]).astype("float64") / 2
        cell = dict(zip(CELL, column.cell, strict=True))
        part = own[["attention"]].astype(object).assign(**cell, higher_is_better=board.measure.higher_is_better)
        parts.append(part.assign(value=own["test"], rank=own["attention"].map(middle).astype("float64")))
    return pd.concat(parts, ignore_index=True)


def _table(columns: list[Column], z: pd.DataFrame, reference: Sequence[str]) -> pd.DataFrame:
    """One row per mechanism, best index first, those that lack a board below, those without any result last.

    Columns: attention, floor, in_reference, those of `composite.summary` (to_baseline is to_softmax), z_PATTERN and
    rank_PATTERN; and for each board score_LABEL, status_LABEL ('ok', a failure, 'not run') and reason_LABEL.
    """
    table = composite.summary(z, BASELINE).rename(columns={"to_baseline": f"to_{BASELINE}"})
    everyone = sorted({row["attention"] for column in columns for row in _rows(column)})
    rest = [name for name in everyone if name not in set(table["attention"])]
    table = table.set_index("attention").reindex([*table["attention"], *rest])
    table["cells"] = table["cells"].fillna(0).astype("int64")
    table["cells_all"] = len(columns)
    table.insert(0, "floor", [name in FLOORS for name in table.index])
    table.insert(1, "in_reference", [name in reference for name in table.index])
    for what in ("z", "rank"):
        patterns = composite.by_pattern(z, what).unstack("pattern")
        for name in dict.fromkeys(column.pattern for column in columns):
            table[f"{what}_{name}"] = patterns[name].reindex(table.index) if name in patterns else float("nan")
    for column in columns:
        own = column.board.table.set_index("attention").reindex(table.index)
        table[f"score_{column.label}"] = own["test_mean"].astype("float64")
        table[f"status_{column.label}"] = own["status"].fillna(NOT_RUN).astype("string")
        table[f"reason_{column.label}"] = own["reason"].fillna("").astype("string")
    return table.rename_axis("attention").reset_index()
