"""How numbers and facts of a board read, in Markdown, in the terminal and under plots alike."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pandas as pd

from bench.report import rows
from bench.report.leaderboard import FLOORS, Board

NOTHING = "–"
CAPITALS = "mse", "mae", "rmse", "mase", "auc", "f1"
BUSY = 1.25  # load per core above which other work must have run beside a sweep's one process per core
EDGES = {"smallest": "▼", "largest": "▲"}


def missing(value: Any) -> bool:
    """None, NaN or pandas' NA."""
    return bool(pd.isna(value))


def named(metric: str) -> str:
    """A metric in words: 'bits per byte', 'MSE'."""
    return " ".join(word.upper() if word in CAPITALS else word for word in metric.split("_"))


def heading(metric: str) -> str:
    """The same at the head of a line."""
    return named(metric)[:1].upper() + named(metric)[1:]


def number(value: Any, fraction: bool = True) -> str:
    """A value of the metric: three decimals for a fraction, four digits otherwise."""
    return NOTHING if missing(value) else f"{value:.3f}" if fraction else f"{value:#.4g}".rstrip(".")


def short(value: Any, fraction: bool = True) -> str:
    """A value for a small place: two decimals for a fraction, three digits otherwise."""
    if missing(value) or fraction:
        return NOTHING if missing(value) else f"{value:.2f}"
    return size(value).replace(" ", "") if 1000 <= abs(value) < 1e15 else f"{value:#.3g}".rstrip(".")


def size(value: Any, unit: str = "") -> str:
    """Three digits and a thousands' prefix: 33.8 k, 412 MB."""
    if missing(value):
        return NOTHING
    power = max(0, min(4, int(math.log10(abs(value)) // 3))) if value else 0
    if power < 4 and abs(value) / 1000**power >= 999.5:
        power += 1  # 999,600 reads 1 M and not 1e+03 k
    digits = f"{value / 1000**power:#.3g}".rstrip(".")
    digits = digits.rstrip("0").rstrip(".") if power == 0 and "." in digits else digits
    return f"{digits} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def rank(row: dict[str, Any]) -> str:
    """'2', '2–4' for a tie, or a dash."""
    if missing(row["rank_best"]):
        return NOTHING
    best, worst = int(row["rank_best"]), int(row["rank_worst"])
    return str(best) if best == worst else f"{best}–{worst}"


def score(board: Board, row: dict[str, Any]) -> str:
    """Mean with interval, or the statuses when there is no mean."""
    fraction = board.fraction
    if missing(row["test_mean"]):
        return str(row["status"])
    if missing(row["test_low"]):
        return f"{number(row['test_mean'], fraction)} (one seed)"
    mean, low, high = (number(row[f"test_{part}"], fraction) for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def every_seed(board: Board, row: dict[str, Any]) -> str:
    """Each seed's value in the order of the seeds, a failed one by its status."""
    values = str(row["seed_values"]).split()
    fraction = board.fraction
    return " ".join(number(float(v), fraction) if _is_number(v) else v for v in values) or NOTHING


def solved(row: dict[str, Any]) -> str:
    """'2/3 [0.21, 0.94]'."""
    if missing(row["solve_rate"]):
        return NOTHING
    return f"{int(row['solved'])}/{int(row['seeds_run'])} [{row['solve_low']:.2f}, {row['solve_high']:.2f}]"


def rate(row: dict[str, Any]) -> str:
    """The chosen learning rate with its mark at an edge of the grid."""
    if missing(row["learning_rate"]):
        return NOTHING
    return f"{row['learning_rate']:g} {'' if missing(row['edge']) else EDGES[row['edge']]}".rstrip()


def note(row: dict[str, Any]) -> str:
    """Why seeds are missing, why it has no rank, or what the row is for."""
    if row["status"] != "ok":
        few = "" if missing(row["rank_best"]) else f"{row['seeds_ok']} of {row['seeds_run']} seeds, {row['status']}: "
        return f"{few}{row['reason']}"
    if not missing(row["leaks"]):
        return f"not ranked, looks ahead: {row['leaks']}"
    return f"floor: {FLOORS[row['attention']]}" if row["attention"] in FLOORS else ""


def metric(board: Board) -> str:
    """'accuracy (fraction, higher is better)'."""
    direction = f"{'higher' if board.measure.higher_is_better else 'lower'} is better"
    name, unit = named(board.metric), named(board.measure.unit)
    return f"{name} ({direction})" if unit in ("", name) else f"{name} ({unit}, {direction})"


def title(board: Board) -> str:
    return f"{board.key.task} · {board.key.backbone} · {board.key.budget}"


def conditions(board: Board) -> dict[str, str]:
    """The facts that hold for the whole board, by heading; several values are counted."""
    runs, key = board.runs, board.key
    mechanisms, rates, seeds = board.grid
    status = Counter(runs["status"])
    failed = len(runs) - status["ok"] - status["unsupported"]
    days = sorted(runs["started_at"].dropna().str.slice(0, 10))
    when = "" if not days else f"; run on {days[0]}" if days[0] == days[-1] else f"; run from {days[0]} to {days[-1]}"
    chance = "" if missing(board.measure.chance) else f"; chance {number(board.measure.chance, board.fraction)}"
    grid = f"{_count(rates, 'learning rate')} × {_count(seeds, 'seed')}"
    if board.by_first_seed and rates > 1:
        others = _count(seeds - 1, "seed")
        grid = f"({_count(rates, 'learning rate')} with the first seed, then {others} at the rate best on valid)"
    return {
        "Task": f"{several(runs['task_id'])}, version {several(runs['task_version'])}; {metric(board)}{chance}",
        "Budget": budget(key.budget, runs),
        "Runs": f"{_count(mechanisms, 'mechanism')} × {grid} = {board.planned} planned: {status['ok']} ok, "
        f"{failed} failed, {status['unsupported']} unsupported, {board.planned - len(runs)} missing{when}",
        "Machine": machine(runs),
    }


def budget(name: str, runs: pd.DataFrame) -> str:
    """Steps and learning rates under a budget's name."""
    grid = ", ".join(f"{value:g}" for value in sorted(runs["learning_rate"].unique()))
    steps = several(runs["max_steps"].map(lambda steps: f"{steps:g}"))
    return f"{name}: at most {steps} steps, learning rates {grid}"


def machine(runs: pd.DataFrame) -> str:
    """Device, precision, versions and commit; several values are counted."""
    ran = runs[runs["status"] == "ok"]  # a run that died before it began does not know its device
    changes = runs["git_dirty"].map({True: " with changes"}).fillna("")
    commits = runs["git_commit"].fillna("unknown").str.slice(0, 10) + changes
    return (
        f"{several(ran['device'])}; {several(runs['dtype'])}; torch {several(runs['torch'])}; "
        f"Python {several(runs['python'])}; commit {several(commits)}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def several(values: Any) -> str:
    """The one value of a column, or each with the number of runs that had it."""
    counts = Counter(str(value) for value in values if not missing(value))
    if len(counts) < 2:
        return next(iter(counts), "unknown")
    return ", ".join(f"{value} ({count} runs)" for value, count in sorted(counts.items(), key=lambda i: (-i[1], i[0])))


def caption(board: Board) -> str:
    """The conditions in one or two short lines, for plots."""
    facts = conditions(board)
    return (
        f"{facts['Task'].split(';')[0]} · backbone {board.key.backbone} · budget {facts['Budget']}\n{facts['Machine']}"
    )


def warnings(board: Board) -> list[str]:
    """What a reader must know before comparing two rows, one line each."""
    lines = []
    ranked = board.table[board.table["rank_best"].notna()].to_dict("records")
    seeds = board.grid[2]
    if len(board.runs) < board.planned:
        lines.append(f"{board.planned - len(board.runs)} runs of the grid are missing; ranks are provisional.")
    if board.grid[1] == 1 and len(ranked) > 1:
        only = board.runs["learning_rate"].iloc[0]
        lines.append(f"One learning rate ({only:g}) for all: none was chosen, and with another ranks may differ.")
    absent = [name for name in FLOORS if name not in set(board.runs["attention"])]
    if absent:
        lines.append(f"Floors not run: {', '.join(absent)}; how far a score is above them is unknown.")
    if board.solvers:
        name, floor = next(iter(board.solvers.items()))
        low = [row["attention"] for row in ranked if not clears(board.measure, row, floor)]
        if low:
            best = f"{name} {number(floor, board.fraction)}"
            side = "above" if board.measure.higher_is_better else "below"
            lines.append(f"Not {side} the best trivial solver ({best}): {', '.join(low)}.")
    few = [f"{row['attention']} ({row['seeds_run']})" for row in ranked if row["seeds_run"] < seeds]
    if few:
        lines.append(f"Fewer than {seeds} seeds at the chosen learning rate: {', '.join(few)}.")
    alone = [row["attention"] for row in ranked if row["seeds_ok"] == 1]
    if alone and len(alone) == len(ranked):
        lines.append("One seed has no interval: all rows tie.")
    elif alone:
        lines.append(f"One seed has no interval and ties with every row: {', '.join(alone)}.")
    hurt = [
        f"{row['attention']} ({row['seeds_ok']} of {row['seeds_run']}, {row['status']})"
        for row in ranked
        if row["status"] != "ok"
    ]
    if hurt:
        lines.append(f"Seeds failed, and the mean of the others flatters: {', '.join(hurt)}.")
    edges = [
        f"{row['attention']} ({row['learning_rate']:g}, {row['edge']})" for row in ranked if not missing(row["edge"])
    ]
    if edges:
        lines.append(f"Best learning rate at the edge of the grid, a wider one may do better: {', '.join(edges)}.")
    timed = board.runs[board.runs["good"]]
    busy = timed["load"][timed["load"] > BUSY]
    if len(busy):
        lines.append(
            f"The machine did other work beside {len(busy)} of {len(timed)} runs (load per core up to "
            f"{busy.max():.1f}): times are not to be compared; scores and sizes do not depend on it."
        )
    shared = timed["gpu_runs"][timed["gpu_runs"] > 1]
    if len(shared):
        lines.append(
            f"Up to {shared.max():.0f} runs at once shared a GPU: times are not those of a run that has it to itself, "
            "and not to be compared; scores and sizes do not depend on it."
        )
    if board.costs["device"].nunique() > 1:
        lines.append("Several devices: times and memory stand apart by device, compare them only within one.")
    return lines


def clears(of: rows.Measure, row: dict[Any, Any], floor: float) -> bool:
    """The whole interval of a row, or its mean where it has none, is better than a floor."""
    if of.higher_is_better:
        return bool((row["test_mean"] if missing(row["test_low"]) else row["test_low"]) > floor)
    return bool((row["test_mean"] if missing(row["test_high"]) else row["test_high"]) < floor)


def failures(board: Board) -> list[list[str]]:
    """attention, status, runs, learning rates, seeds, most frequent reason; one line per mechanism and status."""
    lines = []
    for (attention, status), runs in board.runs[~board.runs["good"]].groupby(["attention", "status"]):
        rates = " ".join(f"{value:g}" for value in sorted(runs["learning_rate"].unique()))
        seeds = " ".join(str(value) for value in sorted(runs["seed"].unique()))
        lines.append([str(attention), str(status), str(len(runs)), rates, seeds, rows.common_reason(runs)])
    return lines


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-."
