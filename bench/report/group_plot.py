"""The plot of a group: scores as a heat map of z, and the composite index with its intervals beside it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bench.report import figure as f
from bench.report import group_page as words
from bench.report import wording
from bench.report.group import Group

FARTHEST = 2.0  # |z| from which on a colour does not change any more


def patterns(group: Group) -> Figure | None:
    """Mechanisms × boards, the score as a number and z of the pattern as the colour; None without any result."""
    rows = group.table[group.table["cells"] > 0].to_dict("records")
    if not rows:
        return None
    known = [row for row in rows if not wording.missing(row["composite"])]
    width, height = 0.95 * len(group.columns), 0.27 * len(rows)
    title = f"{group.key.group}: score on test by pattern, and composite index"
    figure = f.new(2.2 + width + (3.2 if known else 0), 2.0 + height, words.caption(group), title)
    ratios = [width, 3.0] if known else [1]
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    _heat(axes[0], group, rows)
    if known:
        _index(axes[1], group, rows)
    return figure


def _heat(ax: Axes, group: Group, rows: list[dict]) -> None:
    known = [abs(row[f"z_{name}"]) for row in rows for name in group.patterns if not wording.missing(row[f"z_{name}"])]
    limit = min(FARTHEST, max(known, default=FARTHEST)) or FARTHEST
    norm = Normalize(-limit, limit)
    edges = np.arange(len(rows) + 1)
    for left, column in enumerate(group.columns):
        colours = np.array([[row[f"z_{column.pattern}"]] for row in rows], dtype=float)
        score = [row[f"score_{column.label}"] for row in rows]
        colours[[wording.missing(value) for value in score]] = np.nan  # of the pattern, and this board is not in it
        ax.pcolormesh([left, left + 1], edges, colours, cmap="cividis", norm=norm, edgecolors="white", linewidth=0.8)
        for i, row in enumerate(rows):
            text, blank = words.score(column, row), wording.missing(score[i])
            dark = not np.isnan(colours[i, 0]) and norm(colours[i, 0]) < 0.55
            ax.text(
                left + 0.5,
                i + 0.5,
                f.shorten(text, 14),
                ha="center",
                va="center",
                fontsize=5.5 if blank else 6.5,
                color=f.GREY if blank else "white" if dark else "black",
            )
    ax.set(
        xlim=(0, len(group.columns)),
        ylim=(len(rows), 0),
        xlabel="number: score; colour: z of the pattern, bright is better",
    )
    labels = [
        column.label.replace(": ", ":\n").replace(" self", "\nself").replace(" cross", "\ncross")
        for column in group.columns
    ]
    ax.set_xticks(np.arange(len(labels)) + 0.5, labels)
    ax.set_yticks(np.arange(len(rows)) + 0.5, [f.shorten(row["attention"]) for row in rows])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def _index(ax: Axes, group: Group, rows: list[dict]) -> None:
    """Points with intervals; hollow where a board has no result, with the number of those that have one."""
    look = f.looks(group.runs)
    for i, row in enumerate(rows):
        if wording.missing(row["composite"]):
            continue
        colour, marker = look[row["attention"]]
        whole = row["cells"] == row["cells_all"]
        if not wording.missing(row["composite_low"]):
            ax.plot([row["composite_low"], row["composite_high"]], [i + 0.5] * 2, color=colour, lw=1.1, alpha=0.7)
        face = colour if whole else "white"
        ax.plot([row["composite"]], [i + 0.5], marker, color=colour, mfc=face, ms=5)
        if not whole:
            right = max(v for v in (row["composite"], row["composite_high"]) if not wording.missing(v))
            ax.annotate(
                words.coverage(row),
                (right, i + 0.5),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color=f.GREY,
            )
    ax.axvline(0, color=f.GREY, lw=0.8, zorder=0)
    ax.set_xlabel("composite index\n(SDs above the reference set's mean)")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.spines["left"].set_visible(False)
    ax.margins(x=0.12)


PLOTS = {"patterns.png": (patterns, "Score and z by pattern, and the composite index with its interval")}
