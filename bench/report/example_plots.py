"""Plots of single predictions: which classes are mistaken for which, and forecasts beside their target."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report import figure as f
from bench.report import slices, wording
from bench.report.leaderboard import FLOORS, Board

FORECASTS = 4  # mechanisms beside softmax whose forecasts are drawn
PAST = "#5E7FA3"  # of the look-back: neither the grey of the target nor a colour of a mechanism


def confusions(board: Board) -> Figure | None:
    """Confusion matrices of the best mechanism and of softmax."""
    best = dict.fromkeys([*board.ranked[:1], *(name for name in board.ranked if name == "softmax")])
    recorded = {name: slices.confusion(board, name) for name in best}
    found = {name: matrix for name, matrix in recorded.items() if matrix}
    if not found:
        return None
    classes = next(iter(found.values()))[0]
    side = max(2.6, min(8.0, 0.34 * len(classes)))
    title = "Predicted class by true class on test: share of the true class, mean over seeds"
    turned = max(map(len, classes)) > 2  # names of more than two letters stand upright, and take height of their own
    height = side + 1.6 + (0.07 * min(16, max(map(len, classes))) if turned else 0.0)
    figure = f.new((side + 0.9) * len(found) + 0.4, height, wording.caption(board), title)
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    numbers = len(classes) <= 14
    every = 1 + (len(classes) - 1) // 40
    ticks = np.arange(len(classes))[::every]
    names = [f.shorten(name, 16) for name in classes[::every]]
    small = 8.0 if len(classes) <= 24 else 5.5
    score = board.table.set_index("attention")["test_mean"].to_dict()
    for ax, (name, (_, matrix)) in zip(axes, found.items(), strict=True):
        norm = PowerNorm(0.5, 0, 1)  # a root: a few in a hundred are seen beside the diagonal
        ax.imshow(matrix, cmap="cividis", norm=norm, aspect="equal", interpolation="none")
        for i, j in np.argwhere(np.nan_to_num(matrix) >= 0.005) if numbers else []:
            colour = "black" if norm(matrix[i, j]) > 0.55 else "white"
            text = f"{matrix[i, j]:.2f}".lstrip("0")
            ax.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
        ax.set_title(f"{f.shorten(name)}  {wording.number(score[name], board.fraction)}", loc="left")
        ax.set_xticks(ticks, names, fontsize=small, rotation=90 if turned else 0)
        ax.set_yticks(ticks, names, fontsize=small)
        ax.set_xlabel("predicted")
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("true")
    return figure


def forecasts(board: Board) -> Figure | None:
    """Forecast examples: the target, what came before, and what the best mechanisms predict."""
    ordinary = [name for name in board.ranked if name not in FLOORS]
    names = [name for i, name in enumerate(ordinary) if i < FORECASTS or name == "softmax"]
    found = slices.traces(board, names)
    if not found:
        return None
    title = "Forecasts of examples of test: the best mechanisms against the target, one seed"
    figure = f.new(8.6, 2.1 * len(found) + 1.1, wording.caption(board), title)
    axes = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    look = f.looks(board.runs)
    handles: dict[str, Line2D] = {}
    for number, (ax, trace) in enumerate(zip(axes, found, strict=True), 1):
        if len(trace.past[0]):
            (handles["look-back"],) = ax.plot(*trace.past, color=PAST, lw=1.2)
            ax.axvline(trace.past[0][-1], color=f.GREY, lw=0.6, ls=":")
        (handles["target"],) = ax.plot(
            *_joined(trace.past, trace.target), color="#9A9A9A", lw=3.2, solid_capstyle="round"
        )
        for name in reversed(trace.forecasts):
            (handles[name],) = ax.plot(*_joined(trace.past, trace.forecasts[name]), color=look[name][0], lw=1.2)
        ax.set_ylabel(f"example {number}")
        ax.margins(x=0.01)
    axes[-1].set_xlabel(f"step{_time(found[0].minutes)}")
    order = [name for name in ("look-back", "target", *names) if name in handles]
    labels = [f.shorten(name, 26) for name in order]
    figure.legend([handles[name] for name in order], labels, loc="outside right center", fontsize=7, frameon=False)
    return figure


def _joined(past: tuple[np.ndarray, np.ndarray], ahead: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A series that begins at the last point of what came before."""
    steps, values = (np.concatenate([before[-1:], after]) for before, after in zip(past, ahead, strict=True))
    return steps, values


def _time(minutes: float | None) -> str:
    """' of 5 minutes', ' of an hour', or nothing where it is not known."""
    if minutes is None:
        return ""
    for word, size in (("a day", 1440), ("an hour", 60), ("a minute", 1)):
        if minutes >= size and minutes % size == 0:
            number = round(minutes / size)
            return f" of {word}" if number == 1 else f" of {number} {word.split()[1]}s"
    return f" of {minutes:g} minutes"
