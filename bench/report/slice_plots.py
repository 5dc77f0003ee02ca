"""Plots of the slices of a board: heat maps of what is named, curves of what is counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bench.report import figure as f
from bench.report import slices, wording
from bench.report.leaderboard import FLOORS, Board

WIDE = 30  # columns of a line of heat maps; a kind with more values has narrow ones without numbers
NARROW = 0.3
COLOURED = 12  # mechanisms with a colour of their own among curves
LABELS = 12  # of an axis
FEWEST = 10  # items of a point of a curve; of fewer it would show their noise


def by_segment(board: Board) -> Figure | None:
    """Heat map: mechanisms × (length, pairs)."""
    return _heat(board, slices.SEGMENTS, "by length and number of pairs")


def by_distance_and_order(board: Board) -> Figure | None:
    """Heat maps: mechanisms × distance to the key, and × order of the query."""
    return _heat(board, slices.DISTANCES, "by distance and by order")


def by_category(board: Board) -> Figure | None:
    """Heat maps: mechanisms × values of every other kind that is no number."""
    labels = [kind.label for kind in _kinds(board, slices.HEAT).values()]
    return _heat(board, slices.HEAT, _by(labels)) if labels else None


def _by(labels: Iterable[str]) -> str:
    """'by class, level and depth'."""
    *others, last = labels
    return f"by {', '.join(others)} and {last}" if others else f"by {last}"


def _kinds(board: Board, picture: str) -> dict[str, slices.Kind]:
    return {key: kind for key, kind in slices.kinds(board.slices).items() if kind.picture == picture}


def _heat(board: Board, picture: str, by: str) -> Figure | None:
    kinds, names = _kinds(board, picture), board.ranked
    groups = {key: slices.values(board.slices, key) for key in kinds}
    if not groups or not names:
        return None
    value = board.slices.set_index(["attention", "slice_key", "slice_value"])["mean"].to_dict()
    whole = board.table.set_index("attention")["test_mean"].to_dict()
    shown = [value[a, key, v] for key, values in groups.items() for a in names for v in values if (a, key, v) in value]
    if not shown:
        return None
    norm = _norm(board, shown)
    lines = _lines(groups)
    steps = {key: 1.0 if len(values) <= WIDE else NARROW for key, values in groups.items()}
    # the column "all" stands once in a line, with a gap behind it
    starts = {key: 1.4 if key == line[0] else 0.0 for line in lines for key in line}
    widths = {key: starts[key] + steps[key] * len(values) for key, values in groups.items()}
    widest = max(sum(widths[key] for key in line) for line in lines)
    figure = f.new(
        2.2 + 0.44 * widest,
        1.5 + 0.24 * len(names) * len(lines) + 0.8 * (len(lines) - 1),
        wording.caption(board),
        f"{wording.heading(board.metric)} on test {by}, mean over seeds",
    )
    places: Any = [figure] if len(lines) == 1 else figure.subfigures(len(lines), 1)
    for line, place in zip(lines, places, strict=True):
        own = [widths[key] for key in line]
        free = [widest - sum(own)] if widest - sum(own) > 1 else []  # cells are as wide in all lines
        axes = place.subplots(1, len(line) + len(free), sharey=True, squeeze=False, width_ratios=[*own, *free])[0]
        for ax in axes[len(line) :]:
            ax.set_visible(False)
        for ax, key in zip(axes, line, strict=False):
            start, step = starts[key], steps[key]
            columns = [("all", [whole[a] for a in names], 0.0, 1.0)] if start else []
            columns += [
                (v, [value.get((a, key, v), np.nan) for a in names], start + i * step, step)
                for i, v in enumerate(groups[key])
            ]
            for _, numbers, left, width in columns:
                _column(ax, np.array(numbers, dtype=float), left, width, norm, board)
            ax.set(xlim=(0, columns[-1][2] + step), ylim=(len(names), 0), xlabel=kinds[key].label)
            _labels(ax, {left + width / 2: label for label, _, left, width in columns}, names, step)
    return figure


def _labels(ax: Axes, columns: dict[float, str], names: Sequence[str], step: float) -> None:
    """Names of the columns, by place, and of the rows of a heat map."""
    labels = [f.shorten(slices.shown(label), 20) for label in columns.values()]
    slanted: dict[str, Any] = {}
    if step < 1:
        slanted = {"rotation": 90, "fontsize": 6}
    elif max(map(len, labels)) > 4:
        slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(list(columns), labels, **slanted)
    ax.set_yticks(np.arange(len(names)) + 0.5, [f.shorten(name) for name in names])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def _lines(groups: dict[str, list[str]]) -> list[list[str]]:
    """Kinds in lines of heat maps that are not too wide; a kind stands whole in one line."""
    lines: list[list[str]] = []
    free = 0.0
    for key, values in groups.items():
        width = len(values) * (1.0 if len(values) <= WIDE else NARROW)
        if not lines or width > free:
            lines.append([])
            free = float(WIDE)
        lines[-1].append(key)
        free -= width
    return lines


def _norm(board: Board, shown: Sequence[float]) -> Normalize:
    if board.fraction:
        return Normalize(0, 1)
    return (LogNorm if f.wide(shown) else Normalize)(min(shown), max(shown))


def _column(ax: Axes, numbers: np.ndarray, left: float, width: float, norm: Normalize, board: Board) -> None:
    """One column of a heat map, numbers in the cells; cividis is for all kinds of colour vision, bright is better."""
    edges = np.arange(len(numbers) + 1)
    colours = "cividis" if board.measure.higher_is_better else "cividis_r"
    line = 0.8 if width == 1 else 0.2
    ax.pcolormesh(
        [left, left + width], edges, numbers[:, None], cmap=colours, norm=norm, edgecolors="white", linewidth=line
    )
    for row, number in enumerate(numbers if width == 1 else []):
        bright = np.isnan(number) or (norm(number) > 0.55 if board.measure.higher_is_better else norm(number) < 0.45)
        ax.text(
            left + 0.5,
            row + 0.5,
            wording.short(number, board.fraction),
            ha="center",
            va="center",
            fontsize=6.5,
            color="black" if bright else "white",
        )


def by_number(board: Board) -> Figure | None:
    """Curves: the metric against every kind that is a number; the best mechanisms in colour, the others grey."""
    kinds = _kinds(board, slices.CURVES)
    own = board.slices[board.slices["items"] >= FEWEST]
    scales = {key: slices.scale(slices.values(own, key)) for key in kinds}
    scales = {key: scale for key, scale in scales.items() if len(scale.x) > 1}
    names = board.ranked
    if not scales or not names:
        return None
    ordinary = [name for name in names if name not in FLOORS]
    coloured = {*ordinary[:COLOURED], "softmax", *FLOORS} & set(names)
    columns = min(3, len(scales))
    rows = -(-len(scales) // columns)
    title = f"{wording.heading(board.metric)} on test {_by(kinds[key].label for key in scales)}"
    height = max(3.0 * rows, 0.17 * len(coloured) + 0.4) + 1.1
    figure = f.new(3.4 * columns + 1.9, height, wording.caption(board), f"{title}, mean over seeds")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    value = board.slices.set_index(["attention", "slice_key", "slice_value"])["mean"].to_dict()
    look = f.looks(board.runs)
    shown: list[float] = []
    for ax, (key, scale) in zip(axes.flat, scales.items(), strict=False):
        for place, name in enumerate(names):
            known = [v for v in scale.x if (name, key, v) in value]
            joined = [v for v in known if v not in scale.words]
            every = 1 + (len(joined) - 1) // 16
            colour, marker = look[name] if name in coloured else (f.PALE, "")
            form = dict(color=colour, marker=marker, ms=3.5, zorder=3 - place / len(names) if name in coloured else 1)
            style = "--" if name in FLOORS else "-"
            for part, line in ((joined, style), ([v for v in known if v in scale.words], "")):
                ys = [value[name, key, v] for v in part]
                ax.plot([scale.x[v] for v in part], ys, ls=line, lw=1.1, markevery=every, **form)
                shown += ys
        _number_axis(ax, scale)
        ax.set_xlabel(kinds[key].label + (" (log scale)" if scale.logarithmic else ""))
    for ax in axes.flat[len(scales) :]:
        ax.set_visible(False)
    f.value_axis(axes[0, 0], board, shown)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"test {wording.metric(board)}")
    handles = [
        Line2D([], [], color=look[name][0], marker=look[name][1], ms=3.5, lw=1.1, ls="--" if name in FLOORS else "-")
        for name in names
        if name in coloured
    ]
    labels = [f.shorten(name, 26) for name in names if name in coloured]
    if rest := len(names) - len(labels):
        handles.append(Line2D([], [], color=f.PALE, lw=1.1))
        labels.append(f"{rest} {'other' if rest == 1 else 'others'}")
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False, title="best first")
    return figure


def _number_axis(ax: Axes, scale: slices.Scale) -> None:
    """Labels where the values stand; round numbers where there are too many of them to be labelled."""
    numbers = [name for name in scale.x if name not in scale.words]
    if scale.logarithmic:
        f.log_axis(ax.xaxis, str)
    if len(numbers) > LABELS and not scale.logarithmic and not scale.words:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return
    labels = numbers[:: 1 + (len(numbers) - 1) // LABELS] + scale.words
    slanted: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, labels)) > 24 else {}
    ax.set_xticks([scale.x[name] for name in labels], labels, **slanted)
