"""From frames to one board per (task, backbone, budget): selection, ranks, costs, and what was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from bench.report import statistics
from bench.report.frames import Frames

SOLVED = 0.99  # a seed has solved a task of unit 'fraction' from here on; also the ceiling of the edge warning
FLOOR = "none"  # the row of the network without attention
TIMES = ("tokens_per_second", "decode_ms_per_token", "peak_memory_bytes")  # true of one device only
COLUMNS = (
    "rank_best rank_worst attention status reason metric metric_unit test_mean test_low test_high seeds_ok seeds_run "
    "seed_values solved solve_rate solve_low solve_high valid_mean learning_rate edge num_parameters state_bytes "
    "state_length steps device tokens_per_second decode_ms_per_token peak_memory_bytes"
).split()


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
        runs: the runs that count, with their primary metric as `valid` and `test`, `good` (status ok and both scored)
            and `chosen` (at the mechanism's learning rate).
        table: one row per mechanism, COLUMNS; ranked ones first, best first, then those without a result.
        slices: mean over seeds of `test` at the chosen rate: attention, slice_key, slice_value, mean, seeds.
        costs: one row per mechanism and device at the chosen rate; medians over seeds, the maximum of the memory.
        set_aside: attention, why, runs: what does not count.
        solved: threshold of the solve rate.
    """

    key: Key
    frames: Frames
    runs: pd.DataFrame
    table: pd.DataFrame
    slices: pd.DataFrame
    costs: pd.DataFrame
    set_aside: pd.DataFrame
    metric: str
    unit: str
    higher_is_better: bool
    chance: float
    solved: float

    @property
    def bounded(self) -> bool:
        """The metric is a share in [0, 1]: it has a ceiling, and a seed can solve the task."""
        return self.unit == "fraction" and self.higher_is_better

    @property
    def ranked(self) -> list[str]:
        """Mechanisms with a result, best first."""
        return self.table.loc[self.table["rank_best"].notna(), "attention"].tolist()

    @property
    def grid(self) -> tuple[int, int, int]:
        """Mechanisms, learning rates and seeds that were planned, as far as the records show it."""
        return tuple(self.runs[column].nunique() for column in ("attention", "learning_rate", "seed"))  # type: ignore


def boards(frames: Frames, *, solved: float = SOLVED, only: Iterable[tuple[str, str, str]] | None = None) -> list[Board]:
    """Every board that the frames hold, ordered by key; `only` restricts them to some (task, backbone, budget)."""
    wanted = None if only is None else {Key(*key) for key in only}
    groups = frames.runs.groupby(list(Key._fields), sort=True)
    keys = [(Key(*names), rows) for names, rows in groups]  # type: ignore[misc]
    return [_board(key, frames.of(rows), solved) for key, rows in keys if wanted is None or key in wanted]


def _board(key: Key, frames: Frames, solved: float) -> Board:
    runs, set_aside = _counted(frames.runs)
    known = (runs if len(runs) else frames.runs).dropna(subset=["metric", "higher_is_better"])
    last = None if known.empty else known.sort_values(["started_at", "run_id"]).iloc[-1]
    metric, unit, higher, chance = ("score", "", True, float("nan")) if last is None else (
        str(last["metric"]), str(last["metric_unit"]), bool(last["higher_is_better"]), float(last["chance"])
    )  # fmt: skip
    scores = frames.scores[frames.scores["metric"] == metric]
    whole = scores[scores["slice_key"] == "all"]
    for split in ("valid", "test"):
        runs[split] = runs["run_id"].map(whole[whole["split"] == split].set_index("run_id")["value"]).astype("float64")
    runs["good"] = (runs["status"] == "ok") & runs["valid"].notna() & runs["test"].notna()
    rates = {str(name): _rate(rows, higher) for name, rows in runs.groupby("attention")}
    runs["chosen"] = runs["learning_rate"] == runs["attention"].map(rates).astype("float64")
    used = runs[runs["chosen"] & runs["good"]]
    costs = _costs(used)
    bounded = unit == "fraction"
    bounds = (0.0, 1.0) if bounded else (-float("inf"), float("inf"))
    rows = [_row(str(name), group, rates[str(name)], bounds) for name, group in runs.groupby("attention")]
    for row in rows:
        row.update(metric=metric, metric_unit=unit)
        timed = costs[costs["attention"] == row["attention"]]
        if len(timed):
            row.update({c: timed[c].iloc[0] for c in ("num_parameters", "state_bytes", "state_length", "steps")})
            row["device"] = " + ".join(timed["device"])
        if len(timed) == 1:  # times of two devices have no common value: they stay apart, in `costs`
            row.update({column: timed[column].iloc[0] for column in TIMES})
        if bounded and higher and row["values"]:
            row["solved"] = sum(value >= solved for value in row["values"])
            row["solve_rate"] = row["solved"] / row["seeds_run"]
            row["solve_low"], row["solve_high"] = statistics.wilson_interval(row["solved"], row["seeds_run"]) or (None, None)
            if row["valid_mean"] >= solved:
                row["edge"] = None  # at the ceiling no other rate could be better
    table = pd.DataFrame(_ranked(rows, higher), columns=COLUMNS)
    for column in ("rank_best", "rank_worst", "seeds_ok", "seeds_run", "solved"):
        table[column] = table[column].astype("Int64")
    parts = scores[(scores["split"] == "test") & (scores["slice_key"] != "all")].merge(used[["run_id", "attention"]])
    slices = parts.groupby(["attention", "slice_key", "slice_value"], as_index=False).agg(
        mean=("value", "mean"), seeds=("value", "count")
    )
    return Board(key, frames, runs, table, slices, costs, set_aside, metric, unit, higher, chance, solved)


def _counted(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs that may be compared, and a count of the others by reason.

    All rows share the newest run's conditions, and all runs of a mechanism its newest configuration: a YAML that was
    edited under the same name must not be pooled with what it was before.
    """
    runs = runs.sort_values(["started_at", "run_id"])
    why = runs["stale"].map({True: "stale: its code, its task or the training program has changed since"}).astype(object)
    fresh = runs[why.isna()]
    if len(fresh):
        why[fresh.index[fresh["conditions_id"] != fresh["conditions_id"].iloc[-1]]] = (
            "other conditions: the task, backbone or budget of this name had other values"
        )
    fresh = runs[why.isna()]
    newest = fresh.groupby("attention")["cell_id"].transform("last")
    why[fresh.index[fresh["cell_id"] != newest]] = "superseded: the mechanism of this name had another configuration"
    left_out = runs.assign(why=why)[why.notna()].groupby(["attention", "why"], as_index=False).agg(runs=("run_id", "count"))
    return runs[why.isna()].sort_values(["attention", "learning_rate", "seed"], ignore_index=True), left_out


def _rate(rows: pd.DataFrame, higher_is_better: bool) -> float:
    """The chosen learning rate, NaN without a successful run."""
    valid: dict[float, dict[int, float | None]] = {}
    for row in rows.to_dict("records"):
        valid.setdefault(row["learning_rate"], {})[row["seed"]] = row["valid"] if row["good"] else None
    rate = statistics.choose_rate(valid, higher_is_better=higher_is_better)
    return float("nan") if rate is None else rate


def _row(attention: str, rows: pd.DataFrame, rate: float, bounds: tuple[float, float]) -> dict[str, Any]:
    """One mechanism: its seeds at the chosen rate, or the statuses of all its runs when none succeeded."""
    chosen = rows[rows["chosen"]] if rows["chosen"].any() else rows
    good, bad = chosen[chosen["good"]], chosen[~chosen["good"]]
    values = good["test"].tolist()
    interval = statistics.mean_interval(values, bounds=bounds) or (None, None)
    ranked = bool(len(good))
    return dict(
        attention=attention,
        values=values,
        status="ok" if bad.empty else words(bad),
        reason="" if bad.empty else Counter(reasons(bad)).most_common(1)[0][0],
        test_mean=good["test"].mean(),
        test_low=interval[0],
        test_high=interval[1],
        seeds_ok=len(good) if ranked else 0,
        seeds_run=chosen["seed"].nunique(),
        seed_values=" ".join(
            f"{row['test']:.4f}" if row["good"] else str(row["status"]) for row in chosen.to_dict("records")
        ) if ranked else "",
        valid_mean=good["valid"].mean(),
        learning_rate=rate,
        edge=statistics.edge(rate, rows["learning_rate"].tolist()) if ranked else None,
    )  # fmt: skip


def words(runs: pd.DataFrame) -> str:
    """Statuses of runs, the most frequent first: 'oom', or 'nan 6, oom 3'."""
    counts = sorted(Counter(map(str, runs["status"])).items(), key=lambda item: (-item[1], item[0]))
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{status} {count}" for status, count in counts)


def reasons(runs: pd.DataFrame) -> list[str]:
    """One line per run that is not good; an `ok` run is only here when a score is missing."""
    return [
        "no score on valid or test" if row["status"] == "ok" else " ".join(str(row["reason"]).split())
        for row in runs.fillna({"reason": ""}).to_dict("records")
    ]


def _ranked(rows: Sequence[dict[str, Any]], higher_is_better: bool) -> list[dict[str, Any]]:
    """Rows with rank intervals, best mean first; those without a result follow by name."""
    sign = -1.0 if higher_is_better else 1.0
    some = [row for row in rows if row["values"]]
    some.sort(key=lambda row: (sign * row["test_mean"], sign * row["valid_mean"], row["attention"]))
    ranks = statistics.rank_intervals(
        [row["values"] for row in some],
        higher_is_better=higher_is_better,
        whole=[row["seeds_ok"] == row["seeds_run"] for row in some],
    )
    for row, (best, worst) in zip(some, ranks, strict=True):
        row.update(rank_best=best, rank_worst=worst)
    return some + [row for row in rows if not row["values"]]


def _costs(used: pd.DataFrame) -> pd.DataFrame:
    columns = ("num_parameters", "state_bytes", "state_length", "steps", "max_steps", "train_seconds", *TIMES)
    how = {column: (column, "max" if column == "peak_memory_bytes" else "median") for column in columns}
    named = used.assign(device=used["device"].fillna("unknown device"))
    return named.groupby(["attention", "device"], as_index=False).agg(**how)  # type: ignore[call-overload]


def slice_order(value: str) -> tuple[list[int], str]:
    """Sorts '64x4' before '128x4' and '8-15' before '16-31'."""
    return [int(number) for number in re.findall(r"\d+", value)], value


def folder_names(keys: Sequence[Key], defaults: dict[str, str]) -> dict[Key, str]:
    """A folder for each board: the task, then the backbone and budget where they are not the defaults."""
    import hashlib

    names = {}
    for key in keys:
        parts = [key.task, *(part for name, part in zip(Key._fields[1:], key[1:], strict=True) if part != defaults[name])]
        text = "-".join(re.sub(r"[^A-Za-z0-9_.+]+", "-", part.replace("=", "_")).strip("-.") or "board" for part in parts)
        names[key] = text
    taken = Counter(name.casefold() for name in names.values())
    for key, name in names.items():
        if taken[name.casefold()] > 1 or len(name) > 100:  # never two boards in one folder, nor a name too long for one
            names[key] = f"{name[:100]}-{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:8]}"
    return names
