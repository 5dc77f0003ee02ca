"""One board per (task, backbone, budget), and the folder it is written to."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from bench.report import SOLVED, rows
from bench.report.frames import Frames

# rows that choose nothing by content, and what each leaves over; a task that one of them solves needs no attention
FLOORS = {
    "none": "the network without attention",
    "uniform": "the mean of all visible values",
    "short_conv": "local mixing only",
}


class Key(NamedTuple):
    """What a board compares under."""

    task: str
    backbone: str
    budget: str


@dataclass(frozen=True)
class Board:
    """One leaderboard.

    Args:
        frames: everything recorded for it, stale runs included.
        runs: the runs that count, see `rows.judged`.
        table: one row per mechanism, ranked; see `rows.table`.
        slices: test by slice; see `rows.slices`.
        solvers, references: test of trivial solvers, and of those that are no yardstick, by name,
            the best first; see `rows.solvers`.
        costs: sizes and times by mechanism and device; see `rows.costs`.
        set_aside: attention, why, runs: what does not count.
        measure: the metric that ranks.
    """

    key: Key
    frames: Frames
    runs: pd.DataFrame
    table: pd.DataFrame
    slices: pd.DataFrame
    solvers: dict[str, float]
    references: dict[str, float]
    costs: pd.DataFrame
    set_aside: pd.DataFrame
    measure: rows.Measure

    @property
    def metric(self) -> str:
        return self.measure.metric

    @property
    def fraction(self) -> bool:
        """The metric lies in [0, 1]."""
        return self.measure.unit == "fraction"

    @property
    def ranked(self) -> list[str]:
        """Mechanisms with a result, best first."""
        return self.table.loc[self.table["rank_best"].notna(), "attention"].tolist()

    @property
    def grid(self) -> tuple[int, int, int]:
        """Mechanisms, learning rates and seeds that were planned, as far as the records show it."""
        return self.runs["attention"].nunique(), self.runs["learning_rate"].nunique(), self.runs["seed"].nunique()

    @property
    def by_first_seed(self) -> bool:
        """One seed chose the learning rate of the others."""
        return set(self.runs["search"]) == {"first_seed"}

    @property
    def planned(self) -> int:
        """Runs of the whole grid; a search by the first seed ends there for a mechanism that no rate suits."""
        mechanisms, rates, seeds = self.grid
        if not self.by_first_seed:
            return mechanisms * rates * seeds
        return mechanisms * rates + (seeds - 1) * self.runs.loc[self.runs["good"], "attention"].nunique()


def boards(
    frames: Frames, *, solved: float = SOLVED, only: Iterable[tuple[str, str, str]] | None = None
) -> list[Board]:
    """Every board that the frames hold, ordered by key; `only` restricts them to some (task, backbone, budget)."""
    wanted = None if only is None else {Key(*key) for key in only}
    groups = {Key(*map(str, names)): own for names, own in frames.runs.groupby(list(Key._fields), sort=True)}
    return [_board(key, frames.of(own), solved) for key, own in groups.items() if wanted is None or key in wanted]


def _board(key: Key, frames: Frames, solved: float) -> Board:
    count, set_aside = rows.counted(frames.runs)
    of = rows.measure(count if len(count) else frames.runs, solved)
    runs = rows.judged(count, frames.scores, of)
    return Board(
        key=key,
        frames=frames,
        runs=runs,
        table=rows.table(runs, of),
        slices=rows.slices(runs, frames.scores, of),
        solvers=rows.solvers(runs, frames.scores, of),
        references=rows.solvers(runs, frames.scores, of, rows.REFERENCE),
        costs=rows.costs(runs),
        set_aside=set_aside,
        measure=of,
    )


def slice_order(value: str) -> tuple[list[int], str]:
    """Sorts '64x4' before '128x4' and '8-15' before '16-31'."""
    return [int(number) for number in re.findall(r"\d+", value)], value


def folder_names(keys: Sequence[Key], defaults: Mapping[str, str]) -> dict[Key, str]:
    """A folder for each board: the task, then the backbone and the budget where they are not the defaults."""
    names = {}
    for key in keys:
        others = [part for name, part in key._asdict().items() if name != "task" and part != defaults[name]]
        names[key] = "-".join(safe(part) for part in (key.task, *others))
    taken = Counter(name.casefold() for name in names.values())
    for key, name in names.items():
        if taken[name.casefold()] > 1 or len(name) > 100:  # one folder is one board, and its name fits a file system
            names[key] = f"{name[:100]}-{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:8]}"
    return names


def safe(name: str) -> str:
    """A row's name as part of a file name: `mqar(vocab_size=64)` is mqar-vocab_size_64."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.replace("=", "_")).strip("-.") or "board"
