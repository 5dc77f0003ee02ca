"""The page over all boards of a folder: what each measures and how far mechanisms come apart there, from its files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.report import SOLVED, rows, wording
from bench.report.markdown import table

NAME = "README.md"
HEADER = ("board", "measure", "mechanisms", "rates", "seeds", "best", "softmax", "none", "trivial solver", "above it")
LEFT = {0, 1, 5, 8}
RUNS = [
    *("run_id", "started_at", "status", "learning_rate", "seed"),
    *("metric", "metric_unit", "higher_is_better", "chance"),
]
SCORES = ["run_id", "metric", "split", "slice_key", "slice_value", "value"]
INTRODUCTION = """# Leaderboards

A line for each board in this folder; its page has every row, the intervals and the conditions. `rates` counts the
learning rates that were run: of one, none was chosen. `best` is the best mean, often of a tie; `trivial solver` is the
best that no network is needed for, or chance; `above it` counts the ranked rows whose whole interval is better, or
with one seed whose value is.
"""


def page(folder: Path) -> bytes:
    """README.md of a folder of boards; a board that this program cannot read is left out."""
    boards = [line for path in sorted(folder.glob("*/leaderboard.csv")) if (line := _line(path.parent))]
    links = [f"{line[0]}: {line[0][1:-1]}/leaderboard.md" for line in boards]
    over = [path for path in sorted(folder.glob("*/*.md")) if path.name != "leaderboard.md"]
    named = ", ".join(f"[{path.parent.name}]({path.relative_to(folder).as_posix()})" for path in over)
    several = [f"Scores over several boards: {named}.", ""] if over else []
    return "\n".join([INTRODUCTION, table(HEADER, boards, left=LEFT), "", *several, *links, ""]).encode()


def _line(folder: Path) -> list[str] | None:
    try:
        ranking = pd.read_csv(folder / "leaderboard.csv")
        runs = pd.read_csv(folder / "runs.csv", usecols=RUNS, dtype={"metric_unit": "string"}).fillna(
            {"metric_unit": ""}
        )
        scores = pd.read_csv(folder / "scores.csv", usecols=SCORES)
    except (OSError, ValueError):  # not of this program, or not written to the end
        return None
    of = rows.measure(runs, SOLVED)
    solvers = rows.solvers(runs.assign(good=runs["status"] == "ok"), scores, of)
    solver, floor = next(iter(solvers.items()), ("chance", of.chance))
    ranked = ranking[ranking["rank_best"].notna()]
    means = ranked.set_index("attention")["test_mean"]
    fraction = of.unit == "fraction"
    best = wording.NOTHING if means.empty else f"{means.index[0]} {wording.number(means.iloc[0], fraction)}"
    yardstick, above = wording.NOTHING, wording.NOTHING
    if not wording.missing(floor):
        yardstick = f"{solver} {wording.number(floor, fraction)}"
        above = f"{sum(wording.clears(of, row, floor) for row in ranked.to_dict('records'))} of {len(ranked)}"
    return [
        f"[{folder.name}]",
        f"{wording.named(of.metric)}{'' if of.higher_is_better else ', lower is better'}",
        str(len(ranking)),
        str(runs["learning_rate"].nunique()),
        f"{ranking['seeds_run'].max():g}",
        best,
        *(wording.number(means.get(name), fraction) for name in ("softmax", "none")),
        yardstick,
        above,
    ]
