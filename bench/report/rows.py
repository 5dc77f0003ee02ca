"""From the runs of one board to its rows: which runs count, the learning rate, the numbers, the ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pandas as pd

from bench.report import statistics

TIMES = ["tokens_per_second", "decode_ms_per_token", "peak_memory_bytes"]  # true of one device only
SIZES = ["num_parameters", "state_bytes", "state_length", "steps"]
COLUMNS = [
    *("rank_best", "rank_worst", "attention", "status", "reason", "leaks", "metric", "metric_unit"),
    *("test_mean", "test_low", "test_high", "seeds_ok", "seeds_run", "seed_values"),
    *("solved", "solve_rate", "solve_low", "solve_high", "valid_mean", "learning_rate", "edge"),
    *(*SIZES, "device", *TIMES),
]
FLOOR = "floor"  # slice key of what a trivial solver reaches: no part of the split
REFERENCE = "reference"  # likewise, of a solver that is given more, or goes a part of the way
COUNTS = ["rank_best", "rank_worst", "seeds_ok", "seeds_run", "solved"]


class Measure(NamedTuple):
    """The primary metric of a board."""

    metric: str
    unit: str
    higher_is_better: bool
    chance: float
    solved: float  # threshold of the solve rate

    @property
    def bounds(self) -> statistics.Interval:
        """Range of the metric: a share lies in 0..1; what is better the lower (a loss, an error) is not below 0."""
        if self.unit == "fraction":
            return 0.0, 1.0
        return (-float("inf") if self.higher_is_better else 0.0), float("inf")

    @property
    def solvable(self) -> bool:
        """It has a ceiling, so a seed can solve the task."""
        return self.unit == "fraction" and self.higher_is_better


def measure(runs: pd.DataFrame, solved: float) -> Measure:
    """What the newest run says of the metric; runs that died before they began say nothing."""
    known = runs.dropna(subset=["metric", "metric_unit", "higher_is_better"]).sort_values(["started_at", "run_id"])
    if known.empty:
        return Measure("score", "", True, float("nan"), solved)
    last = known.iloc[-1]
    return Measure(last["metric"], last["metric_unit"], bool(last["higher_is_better"]), float(last["chance"]), solved)


def counted(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs that may be compared, and a count of the others by reason.

    All rows share the newest run's conditions, and all runs of a mechanism its newest configuration: a YAML that was
    edited under the same name must not be pooled with what it was before.
    """
    runs = runs.sort_values(["started_at", "run_id"])
    why = pd.Series(pd.NA, index=runs.index, dtype="string")
    why[runs["stale"]] = "stale: its code, its task or the training program has changed since"
    fresh = runs[why.isna()]
    if len(fresh):
        other = fresh.index[fresh["conditions_id"] != fresh["conditions_id"].iloc[-1]]
        why[other] = "other conditions: the task, backbone or budget of this name had other values"
    fresh = runs[why.isna()]
    same = fresh.groupby("data_seed")["data_id"].transform("last")  # of those that are known
    why[fresh.index[(fresh["data_id"] != same).fillna(False)]] = "other data: those of this seed are not what they were"
    fresh = runs[why.isna()]
    newest = fresh.groupby("attention")["cell_id"].transform("last")
    why[fresh.index[fresh["cell_id"] != newest]] = "superseded: the mechanism of this name had another configuration"
    aside = runs.assign(why=why)[why.notna()]
    return (
        runs[why.isna()].sort_values(["attention", "learning_rate", "seed"], ignore_index=True),
        aside.groupby(["attention", "why"], as_index=False).agg(runs=("run_id", "count")),
    )


def judged(runs: pd.DataFrame, scores: pd.DataFrame, of: Measure) -> pd.DataFrame:
    """Runs with their metric as `valid` and `test`, `good` (ok and scored) and `chosen` (at the chosen rate)."""
    whole = scores[(scores["metric"] == of.metric) & (scores["slice_key"] == "all")]
    values = {split: rows.set_index("run_id")["value"] for split, rows in whole.groupby("split")}
    runs = runs.assign(
        **{split: runs["run_id"].map(values.get(split, {})).astype("float64") for split in ("valid", "test")}
    )
    runs["good"] = (runs["status"] == "ok") & runs["valid"].notna() & runs["test"].notna()
    rates = {name: _rate(rows, of.higher_is_better) for name, rows in runs.groupby("attention")}
    runs["chosen"] = runs["learning_rate"] == runs["attention"].map(rates).astype("float64")
    return runs


def _rate(runs: pd.DataFrame, higher_is_better: bool) -> float | None:
    """The learning rate of a mechanism, None without a successful run."""
    valid: dict[float, dict[int, float | None]] = {}
    for run in runs.to_dict("records"):
        valid.setdefault(run["learning_rate"], {})[run["seed"]] = run["valid"] if run["good"] else None
    return statistics.choose_rate(valid, higher_is_better=higher_is_better)


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per mechanism and device at the chosen rate: medians over seeds, of the memory the maximum."""
    used = runs[runs["chosen"] & runs["good"]]
    used = used.assign(device=used["device"].fillna("unknown device"))
    how = {name: (name, "max" if name == "peak_memory_bytes" else "median") for name in [*SIZES, *TIMES]}
    return used.groupby(["attention", "device"], as_index=False).agg(**how)


def table(runs: pd.DataFrame, of: Measure) -> pd.DataFrame:
    """One row per mechanism, COLUMNS: the ranked, best first; those that look ahead, likewise; those without a result.

    What looks ahead in a causal slot has numbers and no rank.
    """
    spent = costs(runs)
    rows = [_row(str(name), own, spent[spent["attention"] == name], of) for name, own in runs.groupby("attention")]
    good, bad = [row for row in rows if row["values"]], [row for row in rows if not row["values"]]
    sign = -1.0 if of.higher_is_better else 1.0
    good.sort(key=lambda row: (sign * row["test_mean"], sign * row["valid_mean"], row["attention"]))
    good.sort(key=lambda row: bool(row["leaks"]))
    fair = [row for row in good if not row["leaks"]]
    ranks = statistics.rank_intervals(
        [row["values"] for row in fair],
        higher_is_better=of.higher_is_better,
        whole=[row["status"] == "ok" for row in fair],
    )
    for row, (best, worst) in zip(fair, ranks, strict=True):
        row.update(rank_best=best, rank_worst=worst)
    return pd.DataFrame([*good, *bad], columns=COLUMNS).astype(dict.fromkeys(COUNTS, "Int64"))


def _row(attention: str, runs: pd.DataFrame, spent: pd.DataFrame, of: Measure) -> dict[str, Any]:
    """One mechanism: its seeds at the chosen rate, or the statuses of all its runs when none succeeded."""
    row: dict[str, Any] = {"attention": attention, "metric": of.metric, "metric_unit": of.unit, "values": []}
    row["leaks"] = next(iter(runs["leaks"].dropna()), None)
    chosen = runs[runs["chosen"]]
    bad = runs if chosen.empty else chosen[~chosen["good"]]
    row["status"], row["reason"] = (words(bad), common_reason(bad)) if len(bad) else ("ok", "")
    if chosen.empty:
        return {**row, "seeds_ok": 0, "seeds_run": runs["seed"].nunique(), "seed_values": ""}
    good = chosen[chosen["good"]]
    values = [float(value) for value in good["test"]]
    form = ".4f" if of.unit == "fraction" else ".6g"
    words_or_values = [f"{r['test']:{form}}" if r["good"] else str(r["status"]) for r in chosen.to_dict("records")]
    low, high = statistics.mean_interval(values, bounds=of.bounds) or (None, None)
    rate, valid = float(chosen["learning_rate"].iloc[0]), float(good["valid"].mean())
    row.update(values=values, test_mean=good["test"].mean(), test_low=low, test_high=high, valid_mean=valid)
    row.update(seeds_ok=len(good), seeds_run=len(chosen), seed_values=" ".join(words_or_values), learning_rate=rate)
    row.update({name: good[name].median() for name in SIZES}, device=" + ".join(spent["device"]))
    if len(spent) == 1:  # times of two devices have no common value: they stay apart, in `costs`
        row.update({name: spent[name].iloc[0] for name in TIMES})
    if not (of.solvable and valid >= of.solved):  # at the ceiling no other rate could be better
        row["edge"] = statistics.edge(rate, runs["learning_rate"].tolist())
    if of.solvable:
        row["solved"] = sum(value >= of.solved for value in values)
        row["solve_rate"] = row["solved"] / len(chosen)
        row["solve_low"], row["solve_high"] = statistics.wilson_interval(row["solved"], len(chosen)) or (None, None)
    return row


def words(runs: pd.DataFrame) -> str:
    """Statuses of runs, the most frequent first: 'oom', or 'nan 6, oom 3'."""
    counts = sorted(Counter(map(str, runs["status"])).items(), key=lambda item: (-item[1], item[0]))
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{status} {count}" for status, count in counts)


def common_reason(runs: pd.DataFrame) -> str:
    """The most frequent reason of runs that are not good, in one line; an `ok` run lacks a score."""
    reasons = runs["reason"].fillna("").where(runs["status"] != "ok", "no score on valid or test")
    return " ".join(Counter(reasons).most_common(1)[0][0].split())


def slices(runs: pd.DataFrame, scores: pd.DataFrame, of: Measure) -> pd.DataFrame:
    """Mean over seeds of `test` at the chosen rate: attention, slice_key, slice_value, mean, seeds, items of a seed."""
    parts = scores[(scores["metric"] == of.metric) & (scores["split"] == "test")]
    parts = parts[~parts["slice_key"].isin(["all", FLOOR, REFERENCE])]
    parts = parts.merge(runs.loc[runs["chosen"] & runs["good"], ["run_id", "attention"]], on="run_id")
    groups = parts.groupby(["attention", "slice_key", "slice_value"], as_index=False)
    return groups.agg(mean=("value", "mean"), seeds=("value", "count"), items=("count", "min"))


def solvers(runs: pd.DataFrame, scores: pd.DataFrame, of: Measure, key: str = FLOOR) -> dict[str, float]:
    """What trivial solvers (or references) reach on `test`, mean over seeds, by name; the best first."""
    parts = scores[(scores["metric"] == of.metric) & (scores["split"] == "test") & (scores["slice_key"] == key)]
    parts = parts.dropna(subset=["value"]).merge(runs.loc[runs["good"], ["run_id", "seed"]], on="run_id")
    by_seed = parts.groupby(["slice_value", "seed"])["value"].first()  # equal for all runs of a seed: they share data
    means = by_seed.groupby("slice_value").mean().to_dict()
    sign = -1.0 if of.higher_is_better else 1.0
    return {str(name): float(means[name]) for name in sorted(means, key=lambda name: (sign * means[name], name))}
