"""The plots of a board; each takes a board and gives a figure, or None when there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import example_plots, slice_plots, slices, wording
from bench.report import figure as f
from bench.report.leaderboard import FLOORS, Board


def against_state(board: Board) -> Figure | None:
    """Test metric against measured state bytes, with intervals and floor lines."""
    rows = [r for r in board.table.to_dict("records") if not wording.missing(r["test_mean"] + r["state_bytes"])]
    drawn = [row for row in rows if row["attention"] not in FLOORS]
    if not drawn:
        return None
    title = f"{wording.heading(board.metric)} on test against the state that decoding carries"
    figure = f.new(7.5, 5.2, wording.caption(board), title)
    ax = figure.subplots()
    positive = [row["state_bytes"] for row in drawn if row["state_bytes"] > 0] or [1.0]
    nothing = min(positive) / 4  # where a mechanism without state stands: a logarithm has no zero
    look = f.looks(board.runs)
    labels = []
    for row in drawn:
        x, y = row["state_bytes"] or nothing, row["test_mean"]
        colour, marker = look[row["attention"]]
        if not wording.missing(row["test_low"]):
            ax.plot([x, x], [row["test_low"], row["test_high"]], color=colour, lw=0.9, alpha=0.7)
        ax.plot([x], [y], marker, color=colour, ms=5)
        labels.append((x, y, f.shorten(row["attention"]), colour))
    xs = [label[0] for label in labels]
    left, right = min(xs) / 2, max(xs) * 2.5
    ticks = [tick for tick in f.round_numbers(left, right) if tick > nothing * 1.5]
    ticks = ticks if min(xs) > nothing else [nothing, *ticks]
    f.log_axis(ax.xaxis, lambda x: "0 B" if x <= nothing else wording.size(x, "B"), ticks)
    ax.set_xlim(left, right)
    f.value_axis(ax, board, [label[1] for label in labels])
    lengths = {f"{row['state_length']:g}" for row in drawn if not wording.missing(row["state_length"])}
    after = f" after {lengths.pop()} tokens" if len(lengths) == 1 else ""
    ax.set(
        xlabel=f"measured state of one sequence{after}, all layers (bytes, log scale)",
        ylabel=f"test {wording.metric(board)}",
    )
    _floors(ax, board)
    f.label_points(ax, labels)
    return figure


def _floors(ax: Axes, board: Board) -> None:
    """Lines for guessing, for the floors and for trivial solvers; close ones share one label, at the highest of them.

    A line that would squeeze the points into a corner is named at the foot and not drawn.
    """
    means = board.table.set_index("attention")["test_mean"].to_dict()
    levels = {"chance": board.measure.chance, **{name: means[name] for name in FLOORS if name in means}}
    known = {**board.references, **board.solvers}
    solvers = {f"({name})": value for name, value in known.items()}  # one may be called as a mechanism is
    levels = {name: value for name, value in {**levels, **solvers}.items() if not wording.missing(value)}
    styles = dict(zip(["chance", *FLOORS], [":", "--", "-.", (0, (7, 2))], strict=True))
    to_axes = ax.transData + ax.transAxes.inverted()
    height = {name: float(to_axes.transform((1, value))[1]) for name, value in levels.items()}
    if not board.fraction:
        far = [name for name in levels if not -1 < height[name] < 2]
        text = ", ".join(f"{name} {wording.number(levels.pop(name), False)}" for name in far)
        if far:
            ax.annotate(
                f"floors out of the frame: {text}",
                (1, 0),
                xycoords="axes fraction",
                xytext=(-2, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=6.5,
                color=f.GREY,
            )
    for name, value in levels.items():
        ax.axhline(value, color=f.GREY, lw=0.8, ls=styles.get(name, (0, (6, 1.5, 1, 1.5, 1, 1.5))))
    height = {name: float(to_axes.transform((1, value))[1]) for name, value in levels.items()}
    close: list[list[str]] = []
    for name in sorted(levels, key=levels.__getitem__):
        if close and height[name] - height[close[-1][-1]] < 0.035:
            close[-1].append(name)
        else:
            close.append([name])
    for names in close:
        ax.annotate(
            f"floor: {', '.join(name for name in levels if name in names)}",
            (1, max(levels[name] for name in names)),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=6.5,
            color=f.GREY,
        )


def valid_curves(board: Board) -> Figure | None:
    """Primary metric on valid by step, at the chosen learning rate."""
    name = wording.named(board.metric)
    return _curves(board, "valid_metric", f"valid {name}", f"{wording.heading(board.metric)} on valid during training")


def loss_curves(board: Board) -> Figure | None:
    """Training loss by step, at the chosen learning rate."""
    # a task scored by a fraction is trained by a cross-entropy; others may be trained by an error in other units
    return _curves(board, "train_loss", f"train loss{' (nats)' if board.fraction else ''}", "Training loss")


def _curves(board: Board, column: str, label: str, title: str) -> Figure | None:
    chosen = board.runs.loc[board.runs["chosen"], ["run_id", "attention", "seed", "good"]]
    history = board.frames.history.merge(chosen, on="run_id").dropna(subset=[column])
    names = [name for name in board.ranked if name in set(history["attention"])]
    if not names:
        return None
    title = f"{title}; mean (thick), each seed (thin), other mechanisms (grey)"
    floor = next(iter(board.solvers.items()), None) if column == "valid_metric" else None
    if floor:
        title += f", best trivial solver on test ({floor[0]} {wording.number(floor[1], board.fraction)}, dashed)"
    figure, axes = f.panels(board, title, names, "step", label)
    seeds: dict[str, list] = {
        name: [(bool(run["good"].iloc[0]), run["step"].to_numpy(float), run[column].to_numpy(float)) for _, run in
               history[history["attention"] == name].groupby("seed")]
        for name in names
    }  # fmt: skip
    means = {name: _mean_curve([(x, y) for good, x, y in runs if good]) for name, runs in seeds.items()}
    look = f.looks(board.runs)
    for ax, name in zip(axes, names, strict=True):
        for other in names:
            ax.plot(*means[other], color=f.PALE, lw=0.7, zorder=1)
        for good, x, y in seeds[name]:
            ax.plot(x, y, color=look[name][0], lw=0.6, alpha=0.6, ls="-" if good else ":")
            ax.plot(x[-1:], y[-1:], "." if good else "x", color=look[name][0], ms=3 if good else 5)
        ax.plot(*means[name], color=look[name][0], lw=1.8)
        if floor:
            ax.axhline(floor[1], color=f.GREY, lw=0.8, ls="--", zorder=1.5)
    last = float(history["step"].max())
    axes[0].set_xlim(0, last * 1.03)
    if column == "valid_metric":
        f.value_axis(axes[0], board, history[column].tolist())
    elif f.wide(history[column].tolist(), 5):
        f.log_axis(axes[0].yaxis, lambda value: f"{value:g}")
    return figure


def _mean_curve(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds while all of them train: the mean of the slow ones alone would fall when one has solved it."""
    if not runs:
        return np.array([]), np.array([])
    steps = sorted(set.intersection(*(set(x) for x, _ in runs)))
    values = [dict(zip(x, y, strict=True)) for x, y in runs]
    return np.array(steps), np.array([np.mean([value[step] for value in values]) for step in steps])


def learning_rates(board: Board) -> Figure | None:
    """Metric on valid against the learning rate; the chosen rate has a ring, failed runs a cross at the foot."""
    runs = board.runs
    names = board.ranked
    grid = sorted(runs["learning_rate"].unique())
    if not names or len(grid) < 2:
        return None
    title = (
        f"{wording.heading(board.metric)} on valid by learning rate; "
        "mean (line), seeds (dots), chosen (ring), failed (×)"
    )
    figure, axes = f.panels(board, title, names, "learning rate (log scale)", f"valid {wording.named(board.metric)}")
    good = runs[runs["good"]]
    means = {name: good[good["attention"] == name].groupby("learning_rate")["valid"].mean() for name in names}
    rates = board.table.set_index("attention")["learning_rate"].to_dict()
    look = f.looks(board.runs)
    for ax, name in zip(axes, names, strict=True):
        for other in names:
            ax.plot(means[other].index, means[other], color=f.PALE, lw=0.7, zorder=1)
        own, failed = good[good["attention"] == name], runs[(runs["attention"] == name) & ~runs["good"]]
        ax.plot(means[name].index, means[name], color=look[name][0], lw=1.6)
        ax.plot(own["learning_rate"], own["valid"], ".", color=look[name][0], ms=4, alpha=0.8)
        ax.plot(
            [rates[name]], [means[name][rates[name]]], "o", mfc="none", mec=look[name][0], ms=10, mew=1.2, clip_on=False
        )
        ax.plot(
            failed["learning_rate"],
            [0.03] * len(failed),
            "x",
            color="#B00020",
            ms=5,
            transform=ax.get_xaxis_transform(),
        )
    f.log_axis(axes[0].xaxis, lambda value: f"{value:g}", grid[:: 1 + (len(grid) - 1) // 4])
    axes[0].set_xlim(grid[0] / 1.4, grid[-1] * 1.4)
    f.value_axis(axes[0], board, good["valid"].tolist())
    return figure


# file name -> (plot, what it shows), in the order of the page
PLOTS = {
    slices.SEGMENTS: (slice_plots.by_segment, "{metric}: by length and number of pairs"),
    "state.png": (against_state, "{metric}: against the measured state"),
    slices.DISTANCES: (slice_plots.by_distance_and_order, "{metric}: by distance and by order"),
    slices.HEAT: (slice_plots.by_category, "{metric}: by kind of example"),
    slices.CURVES: (slice_plots.by_number, "{metric}: by place or size"),
    "confusion.png": (example_plots.confusions, "Predicted class by true class, of the best mechanism and of softmax"),
    "traces.png": (example_plots.forecasts, "Forecasts of the best mechanisms against the target"),
    "learning_rates.png": (learning_rates, "{metric}: on valid by learning rate"),
    "training_valid.png": (valid_curves, "{metric}: on valid during training"),
    "training_loss.png": (loss_curves, "{metric}: training loss"),
}
