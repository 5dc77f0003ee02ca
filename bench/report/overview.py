"""The page over all boards of a folder: what each measures and how far mechanisms come apart there, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from bench.report import wording
from bench.report.markdown import table
from bench.report.rows import FLOOR

NAME = "README.md"
HEADER = ("board", "measure", "mechanisms", "seeds", "best", "softmax", "none", "trivial solver", "above it")
LEFT = {0, 1, 4, 7}
RUNS = ["run_id", "seed", "metric", "metric_unit", "higher_is_better", "chance"]
INTRODUCTION = """# Leaderboards

A line for each board in this folder; its page has every row, the intervals and the conditions. `best` is the best
mean, often of a tie; `trivial solver` is the best that no network is needed for, or chance; `above it` counts the
ranked rows whose whole interval is better.
"""


def page(folder: Path) -> bytes:
    """README.md of a folder of boards; a board that this program cannot read is left out."""
    boards = [line for path in sorted(folder.glob("*/leaderboard.csv")) if (line := _line(path.parent))]
    links = [f"{line[0]}: {line[0][1:-1]}/leaderboard.md" for line in boards]
    return "\n".join([INTRODUCTION, table(HEADER, boards, left=LEFT), "", *links, ""]).encode()


def _line(folder: Path) -> list[str] | None:
    try:
        rows = pd.read_csv(folder / "leaderboard.csv")
        runs = pd.read_csv(folder / "runs.csv", usecols=RUNS)
        scores = pd.read_csv(
            folder / "scores.csv", usecols=["run_id", "metric", "split", "slice_key", "slice_value", "value"]
        )
    except (OSError, ValueError):  # not of this program, or not written to the end
        return None
    runs = runs.dropna(subset=["metric", "higher_is_better"])  # a run that died before it began knows neither
    if runs.empty:
        return None
    metric, unit, higher, chance = runs[RUNS[2:]].iloc[-1]
    fraction = unit == "fraction"
    ranked = rows[rows["rank_best"].notna()]
    scores = scores[(scores["metric"] == metric) & (scores["split"] == "test") & (scores["slice_key"] == FLOOR)]
    solver, floor = _solver(scores.merge(runs[["run_id", "seed"]], on="run_id"), bool(higher)) or ("chance", chance)
    means = ranked.set_index("attention")["test_mean"]
    best = "–" if means.empty else f"{means.index[0]} {wording.number(means.iloc[0], fraction)}"
    return [
        f"[{folder.name}]",
        f"{wording.named(metric)}{'' if higher else ', lower is better'}",
        str(len(rows)),
        f"{rows['seeds_run'].max():g}",
        best,
        *(wording.number(means.get(name), fraction) for name in ("softmax", "none")),
        "–" if wording.missing(floor) else f"{solver} {wording.number(floor, fraction)}",
        "–" if wording.missing(floor) else f"{_above(ranked, floor, bool(higher))} of {len(ranked)}",
    ]


def _solver(scores: pd.DataFrame, higher: bool) -> tuple[str, float] | None:
    """Name and score of the best trivial solver, None when the task has none."""
    means = scores.drop_duplicates(["slice_value", "seed"]).groupby("slice_value")["value"].mean()
    if means.empty:
        return None
    name: Any = means.idxmax() if higher else means.idxmin()
    return str(name), float(means[name])


def _above(ranked: pd.DataFrame, floor: float, higher: bool) -> int:
    """Ranked rows whose interval, or whose mean where there is none, is better than the floor."""
    if higher:
        return int((ranked["test_low"].fillna(ranked["test_mean"]) > floor).sum())
    return int((ranked["test_high"].fillna(ranked["test_mean"]) < floor).sum())
