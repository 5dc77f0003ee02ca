"""What all plots share: style, colour per mechanism, panels, caption, labels that keep apart, bytes of a PNG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.report import wording
from bench.report.leaderboard import FLOORS, Board

Shown = TypeVar("Shown")
DPI = 150
# Okabe and Ito 2008, colours that all kinds of colour vision tell apart; yellow is left out: too pale on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B4FA3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GREY, PALE = "#777777", "#D4D4D4"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#EBEBEB",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "figure.facecolor": "white",
}


def looks(runs: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """(colour, marker) of every mechanism, equal in all plots of these runs; softmax is black, the floors grey."""
    fixed = {"softmax": ("#000000", "o"), **{name: (GREY, mark) for name, mark in zip(FLOORS, "x+*", strict=True)}}
    others = [name for name in sorted(runs["attention"].unique()) if name not in fixed]
    return {
        **fixed,
        # a marker changes with each turn of the colours, so 63 mechanisms differ in one or the other
        **{
            name: (PALETTE[i % len(PALETTE)], MARKERS[(i + i // len(PALETTE)) % len(MARKERS)])
            for i, name in enumerate(others)
        },
    }


def render(draw: Callable[[Shown], Figure | None], board: Shown) -> bytes | None:
    """The PNG of a plot, or None when the board (or group) has nothing to show in it; it holds no date, no version."""
    with matplotlib.style.context(["default", STYLE]):
        figure = draw(board)
        if figure is None:
            return None
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi="figure", metadata={"Software": None})
        return out.getvalue()


def new(width: float, height: float, caption: str, title: str) -> Figure:
    """An empty figure, sizes in inches, with title and a caption (the conditions) that fit the width."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    heading = textwrap.fill(title, int(width * 12))
    caption = "\n".join(textwrap.fill(line, int(width * 20)) for line in caption.splitlines())
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=6, color=GREY)
    return figure


def panels(board: Board, title: str, names: Sequence[str], x: str, y: str) -> tuple[Figure, list[Axes]]:
    """One small panel per mechanism with common axes, its name above it."""
    columns = min(len(names), 4 if len(names) <= 12 else 5 if len(names) <= 20 else 6)
    rows = math.ceil(len(names) / columns)
    figure = new(max(4.8, 2.2 * columns + 0.5), 1.6 * rows + 1.1, wording.caption(board), title)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = [ax for row in grid for ax in row]
    for index, ax in enumerate(axes):
        if index >= len(names):
            ax.set_visible(False)
            continue
        ax.set_title(shorten(names[index], 26), loc="left")
        if index + columns >= len(names):  # nothing below it
            ax.set_xlabel(x)
            ax.tick_params(labelbottom=True)
        if index % columns == 0:
            ax.set_ylabel(y)
    return figure, axes[: len(names)]


def shorten(name: str, length: int = 34) -> str:
    """A name that fits: the middle is left out."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2 - 1) :]}"


def value_axis(ax: Axes, board: Board, values: Sequence[float]) -> None:
    """The metric upwards: 0 to 1 for a fraction; otherwise what `values` need, in logarithms if they lie far apart."""
    if not board.fraction and wide(values):
        low, high = min(values), max(values)
        log_axis(ax.yaxis, lambda value: f"{value:g}", round_numbers(low / 2, high * 2))
        ax.set_ylim(low / 1.5, high * 1.5)
    if board.fraction:
        ax.set_ylim(-0.03, 1.04)
        ax.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def wide(values: Sequence[float], ratio: float = 30) -> bool:
    """Positive and so far apart, by `ratio` or more, that a linear scale would show the large ones alone."""
    return len(values) > 0 and 0 < ratio * min(values) <= max(values)


def round_numbers(low: float, high: float) -> list[float]:
    """Powers of ten in a range, with 2 and 5 times each where they are few."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) < 6 else (1,)
    return [float(tick) for tick in np.outer(decades, steps).ravel() if low <= tick <= high]


def log_axis(axis: Any, form: Callable[[float], str], at: Sequence[float] | None = None) -> None:
    """A logarithmic axis with plain numbers, at powers of ten or at given values."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0,)) if at is None else FixedLocator(list(at)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def label_points(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names (x, y, name, colour) beside their points, clear of each other and of all that is drawn so far.

    Lines must be points, or level or upright: their bounding boxes are kept free. Tries places around each point at
    growing distances and takes the first free one inside the frame, or the one that overlaps least; a label that had
    to move away gets a line to its point.
    """
    figure = ax.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw_without_rendering()  # type: ignore[union-attr]  # settles the layout, so pixels are final
    frame = ax.get_window_extent(renderer)
    pixels = [tuple(ax.transData.transform((x, y))) for x, y, _, _ in points]
    dot = 5.0 * figure.dpi / 72
    # 1 pixel around, or an upright line has no area that a label could overlap
    drawn = [artist.get_window_extent(renderer).padded(1) for artist in (*ax.lines, *ax.texts)]
    taken = [tuple(area.extents) for area in drawn]
    for (x, y, name, colour), (px, py) in sorted(
        zip(points, pixels, strict=True), key=lambda item: (-item[1][1], item[1][0])
    ):
        text = ax.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset pixels", fontsize=7, color=colour, va="center", ha="left"
        )
        box = text.get_window_extent(renderer)
        width, height = box.width, box.height
        best, least = (0.0, 0.0), math.inf
        for dx, dy in _places(width, height, dot):
            here = px + dx, py + dy - height / 2, px + dx + width, py + dy + height / 2
            inside = frame.x0 <= here[0] and here[2] <= frame.x1 and frame.y0 <= here[1] and here[3] <= frame.y1
            cost = sum(_overlap(here, other) for other in taken) + (0 if inside else 1e6)
            if cost < least:
                best, least = (dx, dy), cost
            if cost == 0:
                break
        text.set_position(best)
        taken.append((px + best[0], py + best[1] - height / 2, px + best[0] + width, py + best[1] + height / 2))
        if abs(best[1]) > 1.3 * height:
            near = min(max(0.0, best[0]), best[0] + width), best[1] - math.copysign(height / 2, best[1])
            ax.annotate(
                "",
                (x, y),
                xytext=near,
                textcoords="offset pixels",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5},
            )


def _places(width: float, height: float, dot: float) -> list[tuple[float, float]]:
    """Offsets (left edge, vertical centre) of a label from its point in pixels, the most natural first."""
    sides = [dot + 3, -width - dot - 3]
    places = [(dx, 0.0) for dx in sides] + [(-width / 2, dy * (height / 2 + dot + 2)) for dy in (1, -1)]
    for step in range(1, 15):
        for sign in (-1, 1):
            places += [(dx, sign * step * height * 0.75) for dx in (*sides, -width / 2)]
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Common area of two boxes (left, bottom, right, top)."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
