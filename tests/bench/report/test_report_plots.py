"""Plots by their data and their geometry, not by their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import MECHANISMS, frames

from bench.report import figure, plots, slice_plots
from bench.report.leaderboard import FLOORS, boards

OF_OTHER_TASKS = "slices.png", "curves.png", "confusion.png", "traces.png"  # see test_report_slices
DRAWN = {name: draw for name, (draw, _) in plots.PLOTS.items() if name not in OF_OTHER_TASKS}


@pytest.fixture(scope="module")
def board():
    (only,) = boards(frames())
    return only


def box(artist, drawn):
    return artist.get_window_extent(drawn.canvas.get_renderer())


@pytest.mark.parametrize("name", list(DRAWN))
def test_no_text_is_cut_off(board, name):
    drawn = DRAWN[name](board)
    drawn.draw_without_rendering()
    extent, (width, height) = drawn.get_tightbbox(drawn.canvas.get_renderer()), drawn.get_size_inches()
    margin = 0.02  # inches: hinting rounds glyphs outwards
    assert extent.x0 > -margin and extent.y0 > -margin
    assert extent.x1 < width + margin and extent.y1 < height + margin


def test_labels_of_points_overlap_neither_each_other_nor_points(board):
    drawn = plots.against_state(board)
    drawn.draw_without_rendering()
    (ax,) = drawn.axes
    labels = [text for text in ax.texts if text.get_text() in MECHANISMS]
    assert len(labels) == 10  # all but the floors, which are lines
    areas = [box(text, drawn) for text in labels]
    points = [tuple(ax.transData.transform(line.get_xydata()[0])) for line in ax.lines if line.get_marker() != "None"]
    for i, area in enumerate(areas):
        assert not any(area.overlaps(other) for other in areas[:i]), labels[i].get_text()
        assert not any(area.contains(*point) for point in points), labels[i].get_text()


def test_state_plot_stands_at_the_measured_values(board):
    (ax,) = plots.against_state(board).axes
    drawn = {tuple(line.get_xydata()[0]) for line in ax.lines if line.get_marker() != "None"}
    rows = board.table.set_index("attention")
    expected = {(rows.loc[n, "state_bytes"], rows.loc[n, "test_mean"]) for n in board.ranked if n not in FLOORS}
    assert drawn == expected and ax.get_xscale() == "log"


def floor_lines(data):
    (board,) = boards(data)
    (ax,) = plots.against_state(board).axes
    level = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    return board, level, [text.get_text() for text in ax.texts if text.get_text().startswith("floor")]


def test_chance_and_every_floor_are_lines_and_close_ones_share_a_label():
    board, level, labels = floor_lines(frames(("softmax", *FLOORS), trouble=False))
    means = board.table.set_index("attention")["test_mean"]
    assert level == [board.measure.chance, *(means[name] for name in FLOORS)]
    assert means["none"] < means["short_conv"] < means["uniform"]
    assert labels == ["floor: chance, none", "floor: short_conv", "floor: uniform"]


def test_a_floor_without_a_measured_state_is_a_line_all_the_same():
    data = frames(("softmax", "uniform"), trouble=False)
    data.runs.loc[data.runs["attention"] == "uniform", "state_bytes"] = np.nan
    assert floor_lines(data)[2] == ["floor: chance", "floor: uniform"]


def test_heat_map_cells_show_the_means_of_the_slices(board):
    drawn = slice_plots.by_segment(board)
    (ax,) = drawn.axes
    shown = {(round(t.get_position()[0] - 0.5, 3), round(t.get_position()[1] - 0.5)): t.get_text() for t in ax.texts}
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["all", "32×4", "32×8", "64×4", "64×8", "64×16", "128×16", "128×32"]
    row = board.ranked.index("based")
    value = board.slices.query("attention == 'based' and slice_value == '128x32'")["mean"].iloc[0]
    assert shown[1.4 + 6, row] == f"{value:.2f}"
    assert shown[0.0, row] == f"{board.table.set_index('attention').loc['based', 'test_mean']:.2f}"


def test_training_curves_are_those_of_the_chosen_rate(board):
    drawn = plots.valid_curves(board)
    panel = next(ax for ax in drawn.axes if ax.get_title(loc="left") == "retention")
    colour = figure.looks(board.runs)["retention"][0]
    thin = [line for line in panel.lines if line.get_color() == colour and line.get_linewidth() == 0.6]
    runs = board.runs[board.runs["chosen"] & (board.runs["attention"] == "retention")]
    assert len(thin) == 3 and set(runs["learning_rate"]) == {0.03}
    history = board.frames.history
    for line, run_id in zip(thin, runs.sort_values("seed")["run_id"], strict=True):
        own = history[history["run_id"] == run_id]
        np.testing.assert_array_equal(line.get_xdata(), own["step"].to_numpy(float))
        np.testing.assert_array_equal(line.get_ydata(), own["valid_metric"].to_numpy(float))


def test_mean_curve_ends_where_the_first_seed_ends():
    long, short = (np.array([10.0, 20, 30]), np.array([1.0, 2, 3])), (np.array([10.0, 20]), np.array([3.0, 6]))
    steps, means = plots._mean_curve([long, short])
    assert steps.tolist() == [10, 20] and means.tolist() == [2, 4]


def test_learning_rate_plot_rings_the_choice_and_crosses_the_failures(board):
    axes = {ax.get_title(loc="left"): ax for ax in plots.learning_rates(board).axes}
    ring = next(line for line in axes["retention"].lines if line.get_markersize() == 10)
    assert ring.get_xdata()[0] == 0.03
    crosses = [line for line in axes["gla"].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[0.03] * 3]


def test_a_mechanism_has_one_look_in_all_plots_and_no_two_share_it():
    names = tuple(f"mechanism_{i}" for i in range(58))
    (board,) = boards(frames((*names, "softmax", "none"), seeds=(0,), rates=(0.01,), trouble=False))
    looks = figure.looks(board.runs)
    assert len(looks) == len(set(looks.values())) == 58 + len({"softmax", *FLOORS})


def test_a_plot_without_data_is_none():
    (board,) = boards(frames(("gla",), fail=("gla",), trouble=False))
    assert [name for name, (draw, _) in plots.PLOTS.items() if draw(board) is not None] == []


def test_a_name_with_markup_is_drawn_as_it_is():
    (board,) = boards(frames(("$x^{2$",), seeds=(0,), trouble=False))
    assert all(figure.render(draw, board) for draw in DRAWN.values())
