"""The plots of a board; each takes a board and gives a figure, or None when there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bench.report import figure as f
from bench.report import wording
from bench.report.leaderboard import FLOORS, Board, slice_order


def by_segment(board: Board) -> Figure | None:
    """Heat map: mechanisms × (length, pairs)."""
    return _heat(
        board, {"segment": "length × pairs"}, f"{board.metric.capitalize()} on test by length and number of pairs"
    )


def by_distance_and_order(board: Board) -> Figure | None:
    """Heat maps: mechanisms × distance to the key, and × order of the query."""
    kinds = {"distance": "distance to the key (tokens)", "order": "order of the query"}
    return _heat(board, kinds, f"{board.metric.capitalize()} on test by distance and by order")


def _heat(board: Board, kinds: dict[str, str], title: str) -> Figure | None:
    slices, names = board.slices, board.ranked
    groups = {
        key: sorted(slices.loc[slices["slice_key"] == key, "slice_value"].unique(), key=slice_order) for key in kinds
    }
    groups = {key: values for key, values in groups.items() if values}
    if not groups or not names:
        return None
    fraction = board.fraction
    value = slices.set_index(["attention", "slice_key", "slice_value"])["mean"].to_dict()
    whole = board.table.set_index("attention")["test_mean"].to_dict()
    shown = [value[a, key, v] for key, values in groups.items() for a in names for v in values if (a, key, v) in value]
    norm = Normalize(0, 1) if fraction else Normalize(min(shown), max(shown))
    starts = [1.4 if i == 0 else 0.0 for i in range(len(groups))]  # the column "all" stands once, with a gap behind it
    widths = [len(values) + start for values, start in zip(groups.values(), starts, strict=True)]
    figure = f.new(
        2.2 + 0.44 * sum(widths), 1.5 + 0.24 * len(names), wording.caption(board), f"{title}, mean over seeds"
    )
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
    for ax, start, (key, values) in zip(axes, starts, groups.items(), strict=True):
        columns = [("all", [whole[a] for a in names], 0.0)] if start else []
        columns += [(v, [value.get((a, key, v), np.nan) for a in names], start + i) for i, v in enumerate(values)]
        for _, numbers, left in columns:
            _column(ax, np.array(numbers, dtype=float), left, norm, board)
        ax.set(xlim=(0, columns[-1][2] + 1), ylim=(len(names), 0), xlabel=kinds[key])
        labels = [label.replace("x", "×") for label, _, _ in columns]
        slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 4 else {}
        ax.set_xticks([left + 0.5 for _, _, left in columns], labels, **slanted)
        ax.set_yticks(np.arange(len(names)) + 0.5, [f.shorten(name) for name in names])
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    return figure


def _column(ax: Axes, numbers: np.ndarray, left: float, norm: Normalize, board: Board) -> None:
    """One column of a heat map, numbers in the cells; cividis is for all kinds of colour vision, bright is better."""
    edges = np.arange(len(numbers) + 1)
    colours = "cividis" if board.measure.higher_is_better else "cividis_r"
    ax.pcolormesh([left, left + 1], edges, numbers[:, None], cmap=colours, norm=norm, edgecolors="white", linewidth=0.8)
    for row, number in enumerate(numbers):
        text = "–" if np.isnan(number) else f"{number:.2f}" if board.fraction else f"{number:.3g}"
        bright = np.isnan(number) or (norm(number) > 0.55 if board.measure.higher_is_better else norm(number) < 0.45)
        ax.text(
            left + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color="black" if bright else "white"
        )


def against_state(board: Board) -> Figure | None:
    """Test metric against measured state bytes, with intervals and floor lines."""
    rows = [r for r in board.table.to_dict("records") if not wording.missing(r["test_mean"] + r["state_bytes"])]
    drawn = [row for row in rows if row["attention"] not in FLOORS]
    if not drawn:
        return None
    title = f"{board.metric.capitalize()} on test against the state that decoding carries"
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
    decades = 10.0 ** np.arange(np.floor(np.log10(left)), np.ceil(np.log10(right)) + 1)
    steps = (1, 2, 5) if len(decades) < 6 else (1,)
    ticks = [p for p in np.outer(decades, steps).ravel() if left <= p <= right and p > nothing * 1.5]
    ticks = ticks if min(xs) > nothing else [nothing, *ticks]
    f.log_axis(ax.xaxis, lambda x: "0 B" if x <= nothing else wording.size(x, "B"), ticks)
    ax.set_xlim(left, right)
    f.value_axis(ax, board)
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
    """Lines for guessing and for the floors; lines that are close share one label, at the highest of them."""
    means = board.table.set_index("attention")["test_mean"].to_dict()
    levels = {"chance": board.measure.chance, **{name: means[name] for name in FLOORS if name in means}}
    levels = {name: value for name, value in levels.items() if not wording.missing(value)}
    styles = dict(zip(["chance", *FLOORS], [":", "--", "-.", (0, (7, 2))], strict=True))
    for name, value in levels.items():
        ax.axhline(value, color=f.GREY, lw=0.8, ls=styles[name])
    low, high = ax.get_ylim()
    close: list[list[str]] = []
    for name in sorted(levels, key=levels.__getitem__):
        if close and levels[name] - levels[close[-1][-1]] < 0.035 * (high - low):
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
    return _curves(
        board, "valid_metric", f"valid {board.metric}", f"{board.metric.capitalize()} on valid during training"
    )


def loss_curves(board: Board) -> Figure | None:
    """Training loss by step, at the chosen learning rate."""
    return _curves(board, "train_loss", "train loss (nats)", "Training loss")


def _curves(board: Board, column: str, label: str, title: str) -> Figure | None:
    chosen = board.runs.loc[board.runs["chosen"], ["run_id", "attention", "seed", "good"]]
    history = board.frames.history.merge(chosen, on="run_id").dropna(subset=[column])
    names = [name for name in board.ranked if name in set(history["attention"])]
    if not names:
        return None
    figure, axes = f.panels(
        board, f"{title}; mean (thick), each seed (thin), other mechanisms (grey)", names, "step", label
    )
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
    last = float(history["step"].max())
    axes[0].set_xlim(0, last * 1.03)
    if column == "valid_metric":
        f.value_axis(axes[0], board)
    elif (history[column] > 0).all():
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
        f"{board.metric.capitalize()} on valid by learning rate; mean (line), seeds (dots), chosen (ring), failed (×)"
    )
    figure, axes = f.panels(board, title, names, "learning rate (log scale)", f"valid {board.metric}")
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
    f.value_axis(axes[0], board)
    return figure


# file name -> (plot, what it shows), in the order of the page
PLOTS = {
    "segments.png": (by_segment, "by length and number of pairs"),
    "state.png": (against_state, "against the measured state"),
    "distance_order.png": (by_distance_and_order, "by distance and by order"),
    "learning_rates.png": (learning_rates, "on valid by learning rate"),
    "training_valid.png": (valid_curves, "on valid during training"),
    "training_loss.png": (loss_curves, "training loss"),
}
