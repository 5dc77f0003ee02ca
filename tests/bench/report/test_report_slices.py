"""Floors of trivial solvers, slices by kind and metrics in other units: in the table, on the page and in the plots."""

from __future__ import annotations

import re

import matplotlib.style
import numpy as np
import pytest
import sliced
from rich.console import Console
from sliced import NAMES, OPERATORS, POSITIONS, SINCE

from bench import report
from bench.report import example_plots, figure, files, group, group_page, markdown, plots, slice_plots, slices, wording
from bench.report.frames import Frames
from bench.report.leaderboard import FLOORS, boards

ADDED = "slices.png", "curves.png", "confusion.png", "traces.png"


@pytest.fixture(scope="module")
def found():
    return {name: boards(data())[0] for name, data in sliced.ALL.items()}


@pytest.fixture(autouse=True)
def style():
    with matplotlib.style.context(["default", figure.STYLE]):
        yield


def lines_of(ax):
    """Curves of an axis by colour and marker, one for each look."""
    return {(line.get_color(), line.get_marker()): line for line in ax.lines if line.get_linestyle() != "None"}


def texts(ax):
    return [text.get_text() for text in ax.texts]


def ranking(board):
    header, lines = markdown.ranking(board)
    return header, {line[1]: line for line in lines}


# -- floors of trivial solvers ----------------------------------------------------------------------


def test_solvers_are_means_over_seeds_the_best_first(found):
    assert found["listops"].solvers == pytest.approx({"root operator": 0.363, "majority": 0.173})  # + 0.001 per seed
    assert list(found["listops"].solvers) == ["root operator", "majority"]
    assert list(found["language"].solvers) == ["bigram", "unigram"]  # lower is better
    assert found["digits"].solvers == {}


def test_references_stand_beside_the_floors_and_are_no_yardstick():
    data = sliced.listops()
    known = data.scores["slice_value"] == "root operator"
    data.scores.loc[known, "slice_key"] = "reference"
    (board,) = boards(data)
    assert board.references == pytest.approx({"root operator": 0.363}) and list(board.solvers) == ["majority"]
    lines = {line[1]: line for line in markdown.ranking(board)[1]}
    assert lines["(root operator)"][-1] == "reference: a part of the answer"
    assert not [line for line in wording.warnings(board) if "root operator" in line]
    assert "reference" not in set(board.slices["slice_key"])


def test_a_seed_with_more_runs_weighs_no_more_than_another():
    data = sliced.listops()
    few = data.of(data.runs[(data.runs["seed"] == 0) | (data.runs["attention"] == "softmax")])
    assert boards(few)[0].solvers["majority"] == pytest.approx(0.173)


def test_solvers_stand_under_the_ranked_rows_before_chance(found):
    lines = markdown.ranking(found["listops"])[1]
    assert [line[1] for line in lines[-4:]] == ["none", "(root operator)", "(majority)", "(chance)"]
    assert [line[2] for line in lines[-3:]] == ["0.363", "0.173", "0.100"]
    assert lines[-2] == ["–", "(majority)", "0.173", "–", "–", "–", "–", "floor: trivial solver"]
    assert "**floor: trivial solver**" in markdown.page(found["listops"], {})
    assert "trivial solver" not in markdown.page(found["digits"], {})


def test_rows_whose_interval_does_not_clear_the_best_solver_are_named(found):
    (line,) = [line for line in wording.warnings(found["listops"]) if "trivial" in line]
    table = found["listops"].table.set_index("attention")
    assert table.loc["based", "test_mean"] > 0.363 > table.loc["based", "test_low"]
    assert table.loc["delta_net", "test_low"] > 0.363
    assert line == (
        "Not above the best trivial solver (root operator 0.363): based, retention, short_conv, linear, uniform, none."
    )
    (line,) = [line for line in wording.warnings(found["forecast"]) if "trivial" in line]
    assert line == "Not below the best trivial solver (last value 0.4910): linear, short_conv, uniform, none."
    assert not [line for line in wording.warnings(found["language"]) if "trivial" in line]  # all are below 3.4


def test_one_seed_without_interval_is_held_against_its_mean():
    (board,) = boards(sliced.listops(seeds=(0,)))
    (line,) = [line for line in wording.warnings(board) if "trivial" in line]
    assert "softmax" not in line and "retention" in line


def test_a_floor_is_never_a_slice(found):
    for board in found.values():
        assert not set(board.slices["slice_key"]) & {"floor", "confusion", "trace0", "trace1", "trace0_past"}
        assert "by floor" not in markdown.page(board, {})
        assert "majority" not in files.csv(board.table, board).decode()


def test_solvers_are_lines_of_the_state_plot_that_share_labels_with_close_floors(found):
    board = found["listops"]
    (ax,) = plots.against_state(board).axes
    level = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert level[-2:] == list(board.solvers.values()) and len(level) == 1 + len(FLOORS) + 2
    assert [t for t in texts(ax) if t.startswith("floor")] == [
        *("floor: chance", "floor: none, (majority)", "floor: uniform", "floor: short_conv, (root operator)")
    ]


def test_a_solver_named_like_a_mechanism_does_not_take_its_line():
    (board,) = boards(sliced.listops(floors={"none": 0.5}))
    (ax,) = plots.against_state(board).axes
    assert {"floor: (none)", "floor: none"} <= set(texts(ax))


def test_the_best_solver_is_a_line_in_every_learning_curve(found):
    for name in ("listops", "digits"):
        for ax in plots.valid_curves(found[name]).axes[:10]:
            level = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
            assert level == list(found[name].solvers.values())[:1]
    assert "(root operator 0.363, dashed)" in plots.valid_curves(found["listops"])._suptitle.get_text().replace(
        "\n", " "
    )


def test_solvers_stand_at_the_foot_of_a_group_page():
    facts = dict(task_group="reasoning", pattern="noncausal self")
    one = sliced.listops(**facts)
    other = sliced.listops(**{**facts, "task": "other", "floors": {"majority": 0.2, "copy": 0.3}})
    (page,) = group.groups(boards(sliced.joined(one, other)))
    lines = group_page.summary(page)[1]
    assert [line[0] for line in lines[-4:]] == ["(root operator)", "(majority)", "(copy)", "(chance)"]
    assert [line[5:7] for line in lines[-4:]] == [["0.363", "–"], ["0.173", "0.201"], ["–", "0.301"], ["0.100"] * 2]
    assert {len(line) for line in lines} == {len(group_page.summary(page)[0])}


# -- kinds of slices --------------------------------------------------------------------------------


def kinds_of(board):
    return {key: kind.picture for key, kind in slices.kinds(board.slices).items()}


def test_numbers_are_curves_and_words_are_heat_maps(found):
    assert kinds_of(found["language"]) == {"position": "curves.png", "since": "curves.png"}
    assert kinds_of(found["listops"]) == {"operator": "slices.png", "depth": "slices.png", "length": "curves.png"}
    assert kinds_of(found["forecast"]) == {"variable": "slices.png", "horizon": "curves.png"}


def test_a_kind_that_nobody_named_is_drawn_by_its_values():
    def made(name, value, seed):
        words = [("accuracy", value, "part_of_speech", v) for v in ("noun", "verb")]
        return words + [("accuracy", value, "age", v) for v in ("0", "1-10", "11+")]

    (board,) = boards(sliced.board((0.5,), made, "accuracy", "fraction", True, names=("softmax",)))
    assert kinds_of(board) == {"age": "curves.png", "part_of_speech": "slices.png"}
    assert slices.kinds(board.slices)["part_of_speech"].label == "part of speech"
    assert "## Accuracy by part of speech" in markdown.page(board, {}) and "by age" not in markdown.page(board, {})


def test_ends_of_numbers_and_ranges():
    known = {"8": (8, 8), "8-15": (8, 15), "64+": (64, 64), ">=64": (64, 64), "-3": (-3, -3), "0.5": (0.5, 0.5)}
    assert {value: slices.ends(value) for value in known} == known
    assert [slices.ends(value) for value in ("never", "64x4", "a>b", "1-2-3", "")] == [None] * 5


def test_powers_of_two_stand_on_a_logarithmic_axis_and_words_behind_them():
    scale = slices.scale(SINCE)
    assert scale.logarithmic and scale.words == ["never"]
    assert list(scale.x.items()) == [*zip(SINCE[:-1], [1, 2, 4, 8, 16, 32, 64], strict=True), ("never", 256)]
    assert slices.scale(["0", "1", "2-3", "4-7"]).x == {"0": 0.5, "1": 1, "2-3": 2, "4-7": 4}
    assert not slices.scale(POSITIONS).logarithmic and slices.scale(POSITIONS).x["0-15"] == 7.5
    assert slices.scale(["16", "32", "64", "100"]).logarithmic  # the last band ends where the data do
    assert not slices.scale(["1", "2", "3", "4"]).logarithmic


def test_tables_are_printed_for_kinds_with_few_values(found):
    page = markdown.page(found["listops"], {})
    section = page.split("## Accuracy by operator")[1].split("\n## ")[0]
    assert [c.strip() for c in section.splitlines()[4].split("|")[1:-1]] == ["attention", *OPERATORS]
    assert len(re.findall(r"^\| (?!attention|-)", section, re.M)) == len(NAMES)
    assert "## Accuracy by depth" in page and "## Accuracy by length" not in page
    (many,) = boards(sliced.digits(classes=13))
    assert "## Accuracy by digit" not in markdown.page(many, {}) and slice_plots.by_category(many) is not None


def test_an_x_stands_for_times_between_numbers_only():
    assert [slices.shown(v) for v in ("64x4", "box", "MAX")] == ["64×4", "box", "MAX"]


# -- heat maps, curves ------------------------------------------------------------------------------


def test_a_heat_map_has_a_panel_for_each_kind_and_all_rows(found):
    board = found["listops"]
    operator, depth = slice_plots.by_category(board).axes
    assert [t.get_text() for t in operator.get_xticklabels()] == ["all", *OPERATORS]
    assert [t.get_text() for t in depth.get_xticklabels()] == [str(i) for i in range(2, 11)]
    assert [t.get_text() for t in operator.get_yticklabels()] == board.ranked
    assert (operator.get_xlabel(), depth.get_xlabel()) == ("operator", "depth")


def test_many_kinds_stand_in_several_lines_and_many_values_without_numbers():
    def made(name, value, seed):
        sizes = {"class": 40, "level": 20, "setting": 20}
        return [("accuracy", value, key, f"v{i}") for key, size in sizes.items() for i in range(size)]

    (board,) = boards(sliced.board((0.5, 0.4), made, "accuracy", "fraction", True, names=("softmax", "none")))
    drawn = slice_plots.by_category(board)
    shown = [ax for ax in drawn.axes if ax.get_visible()]
    assert [ax.get_xlabel() for ax in shown] == ["class", "level", "setting"]
    assert [len(ax.texts) for ax in shown] == [2, 2 * 21, 2 * 21]  # of the class only "all"
    drawn.draw_without_rendering()
    tops = [ax.get_window_extent().y1 for ax in shown]
    assert tops == sorted(tops, reverse=True) and len(set(tops)) == 3


def test_slices_of_rows_without_a_rank_alone_are_not_drawn():
    data = sliced.forecast(names=("softmax", "none"), values=(0.3, 0.6), seeds=(0,))
    ahead = data.runs["attention"] == "softmax"
    data.runs.loc[ahead, "leaks"] = "it sorts all keys"
    other = ~data.scores["run_id"].isin(data.runs.loc[ahead, "run_id"]) & data.scores["slice_key"].isin(["variable"])
    (board,) = boards(Frames(data.runs, data.scores[~other], data.history))
    assert board.ranked == ["none"] and slice_plots.by_category(board) is None


def test_bright_is_better_where_lower_is_better(found):
    board = found["forecast"]
    (ax,) = slice_plots.by_category(board).axes
    column = ax.collections[1]  # of the first variable
    column.update_scalarmappable()
    light = column.get_facecolors()[:, :3].sum(1)
    assert light[0] == max(light) and light[-1] == min(light)
    assert {t.get_text(): t.get_color() for t in ax.texts}["63.0"] == "white"
    assert light[0] - light[-2] > 0.1  # one far-off row does not make the others equal


def test_curves_stand_at_the_means_of_the_slices_best_first(found):
    board = found["language"]
    drawn = slice_plots.by_number(board)
    position, since = drawn.axes
    look = figure.looks(board.runs)
    value = board.slices.set_index(["attention", "slice_key", "slice_value"])["mean"]
    assert len(lines_of(position)) == len(NAMES)
    line = lines_of(since)[look["based"]]
    assert list(line.get_xdata()) == [1, 2, 4, 8, 16, 32, 64]  # "never" is a point of its own
    assert list(line.get_ydata()) == [value["based", "since", v] for v in SINCE[:-1]]
    (alone,) = [line for line in since.lines if line.get_linestyle() == "None" and line.get_color() == look["based"][0]]
    assert (alone.get_xdata()[0], alone.get_ydata()[0]) == (256, value["based", "since", "never"])
    assert (position.get_xscale(), since.get_xscale()) == ("linear", "log")
    assert [t.get_text() for t in since.get_xticklabels()] == list(SINCE)
    assert [t.get_text() for t in drawn.legends[0].texts] == board.ranked
    assert position.get_ylabel() == "test bits per byte (lower is better)"


def test_all_but_the_best_softmax_and_the_floors_are_grey():
    names = (*(f"m{i:02}" for i in range(20)), "softmax", "none")

    def by_length(name, value, seed):
        return [("accuracy", value, "length", str(100 * i)) for i in range(1, 4)]

    data = sliced.board(np.linspace(0.9, 0.2, 22), by_length, "accuracy", "fraction", True, names=names, noise=0)
    drawn = slice_plots.by_number(boards(data)[0])
    grey = [line for line in drawn.axes[0].lines if line.get_color() == figure.PALE and len(line.get_xdata())]
    assert len(grey) == 8
    labels = [t.get_text() for t in drawn.legends[0].texts]
    assert labels == [*names[:12], "softmax", "none", "8 others"]


def test_values_that_lie_far_apart_stand_on_a_logarithmic_axis(found):
    (ax,) = slice_plots.by_number(found["forecast"]).axes
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] < 0.16 and ax.get_ylim()[1] > 30
    assert {ax.get_yscale() for ax in slice_plots.by_number(found["language"]).axes} == {"linear"}


# -- confusions, forecasts --------------------------------------------------------------------------


def test_a_confusion_matrix_is_the_mean_over_seeds_with_rows_that_add_up(found):
    board = found["digits"]
    classes, matrix = slices.confusion(board, "softmax")
    assert classes == [str(i) for i in range(10)]
    np.testing.assert_allclose(matrix.sum(1), 1)
    own = board.runs[board.runs["attention"] == "softmax"].set_index("seed")["test"]
    assert matrix[0, 0] == pytest.approx(own.mean())
    assert matrix[0, 1] == pytest.approx((1 - own[0]) / 3)  # only seed 0 recorded it; the others did not do it
    assert matrix[4, 9] == pytest.approx(1 - own.mean())


def test_confusions_are_those_of_the_best_and_of_softmax(found):
    board = found["digits"]
    assert board.ranked[0] == "based_hybrid"
    drawn = example_plots.confusions(board)
    assert [ax.get_title(loc="left").split()[0] for ax in drawn.axes] == ["based_hybrid", "softmax"]
    ax = drawn.axes[1]
    assert (ax.get_xlabel(), drawn.axes[0].get_ylabel()) == ("predicted", "true")
    shown = {t.get_position(): t.get_text() for t in ax.texts}
    matrix = slices.confusion(board, "softmax")[1]
    assert shown[9, 4] == f"{matrix[4, 9]:.2f}"[1:]  # x is the predicted class
    (best,) = boards(sliced.digits(names=("softmax", "none"), values=(0.9, 0.5)))
    assert len(example_plots.confusions(best).axes) == 1


def test_a_class_without_examples_is_a_row_without_shares():
    data = sliced.digits()
    scores = data.scores[~data.scores["slice_value"].str.startswith("3>")]
    classes, matrix = slices.confusion(boards(Frames(data.runs, scores, data.history))[0], "none")
    assert np.isnan(matrix[classes.index("3")]).all() and np.isfinite(np.delete(matrix, 3, 0)).all()


def test_forecasts_stand_beside_the_target_and_behind_the_look_back(found):
    board = found["forecast"]
    names = board.ranked[:2]
    first, second = slices.traces(board, names)
    assert (first.name, second.name) == ("trace0", "trace1")
    assert list(first.past[0]) == list(range(-48, 0)) and len(second.past[0]) == 0
    assert list(first.target[0]) == list(range(24)) and list(first.forecasts) == names
    np.testing.assert_allclose(first.target[1], np.sin(np.arange(24) / 4))  # of seed 0
    np.testing.assert_allclose(first.past[1], np.sin(np.arange(-48, 0) / 4))
    assert (first.minutes, second.minutes) == (30, None)
    drawn = example_plots.forecasts(board)
    upper, lower = drawn.axes
    assert lower.get_xlabel() == "step of 30 minutes"
    for line in upper.lines[2:]:  # target and forecasts go on from the last known value, at step -1 here
        assert line.get_xdata()[0] == -1 and line.get_ydata()[0] == pytest.approx(first.past[1][-1])
    assert all(line.get_xdata()[0] == 0 for line in lower.lines), "no look-back was recorded there"
    labels = [t.get_text() for t in drawn.legends[0].texts]
    assert labels == ["look-back", "target", *board.ranked[:4]]
    look = figure.looks(board.runs)
    colours = [[line.get_color() for line in ax.lines] for ax in drawn.axes]
    assert all(look[name][0] in colours[i] for name in board.ranked[:4] for i in (0, 1))


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (None, ""),
        (5, " of 5 minutes"),
        (60, " of an hour"),
        (180, " of 3 hours"),
        (1440, " of a day"),
        (0.5, " of 0.5 m"),
    ],
)
def test_the_time_of_a_step_is_in_words(minutes, words):
    assert example_plots._time(minutes).startswith(words) and bool(words) == bool(example_plots._time(minutes))


def test_softmax_is_drawn_wherever_it_stands():
    values = [0.9, *np.linspace(0.3, 0.8, 9)]
    drawn = example_plots.forecasts(boards(sliced.forecast(values=values))[0])
    assert [t.get_text() for t in drawn.legends[0].texts][-1] == "softmax" and len(drawn.legends[0].texts) == 2 + 5


# -- other units ------------------------------------------------------------------------------------


def test_a_metric_without_a_ceiling_has_no_column_of_solved_seeds(found):
    for name in ("language", "forecast"):
        header, lines = ranking(found[name])
        assert "solved" not in header and {len(line) for line in lines.values()} == {len(header)}
        assert "**solved**" not in markdown.page(found[name], {})
    assert "solved" in ranking(found["listops"])[0]


def test_lower_is_better_ranks_and_chooses_upwards(found):
    means = found["language"].table["test_mean"]
    assert means.is_monotonic_increasing and found["language"].table["rank_best"].iloc[-1] == len(NAMES)


def test_numbers_of_other_units_have_four_digits_and_no_capital_mistakes(found):
    assert [wording.number(v, False) for v in (2.1, 0.5, 1234.5, 3.0)] == ["2.100", "0.5000", "1234", "3.000"]
    assert [wording.short(v, False) for v in (0.35, 21.0, 1234.0, 45600.0)] == ["0.350", "21.0", "1.23k", "45.6k"]
    assert [wording.heading(m) for m in ("bits_per_byte", "mse", "macro_f1")] == ["Bits per byte", "MSE", "Macro F1"]
    assert wording.metric(found["forecast"]) == "MSE (lower is better)"
    assert wording.metric(found["listops"]) == "accuracy (fraction, higher is better)"
    small = sliced.forecast(values=[1.2e-5 * (i + 1) for i in range(10)])
    assert re.fullmatch(r"(1\.\d{3}e-05 ?){3}", ranking(boards(small)[0])[1]["softmax"][3])


def test_a_missing_chance_is_nowhere(found):
    page = markdown.page(found["forecast"], {})
    assert "chance" not in page and not re.search(r"\b(nan|NaN|None)\b", page)
    (ax,) = plots.against_state(found["forecast"]).axes
    assert not [t for t in texts(ax) if "chance" in t]


def test_floors_far_off_do_not_squeeze_the_state_plot(found):
    (ax,) = plots.against_state(found["language"]).axes
    assert ax.get_ylim()[1] < 3.4 and ax.get_ylabel() == "test bits per byte (lower is better)"
    (text,) = [t for t in texts(ax) if "out of the frame" in t]
    assert "chance 8.000" in text and "(unigram) 4.901" in text and "short_conv" not in text
    assert "floor: short_conv" in texts(ax)


def test_the_loss_is_in_nats_only_where_it_is_a_cross_entropy_for_certain(found):
    labels = {name: plots.loss_curves(board).axes[0].get_ylabel() for name, board in found.items()}
    assert labels == {
        "language": "train loss",
        "listops": "train loss (nats)",
        "digits": "train loss (nats)",
        "forecast": "train loss",
    }


def test_a_loss_within_less_than_a_decade_has_a_plain_axis(found):
    (ax, *_) = plots.loss_curves(found["language"]).axes
    ax.figure.draw_without_rendering()
    assert ax.get_yscale() == "linear" and len(ax.get_yticks()) > 2


# -- files ------------------------------------------------------------------------------------------


def test_pictures_have_fixed_names_that_a_page_may_remove():
    assert set(ADDED) < set(files.OWN) and list(plots.PLOTS)[:3] == ["segments.png", "state.png", "distance_order.png"]


def test_files_follow_the_slices_and_go_with_them(tmp_path):
    expected = {"language": {"curves.png"}, "listops": {"slices.png", "curves.png"}}
    expected |= {"digits": {"slices.png", "confusion.png"}, "forecast": {"slices.png", "curves.png", "traces.png"}}
    facts = dict(task="t", task_id="t/t", seeds=(0,), names=("softmax", "none"), values=(0.4, 0.6))
    for name, wanted in expected.items():
        paths = report.write(
            sliced.ALL[name](**facts), tmp_path, defaults=dict(backbone="conv_decoder", budget="small")
        )
        there = {p.name for p in (tmp_path / "t").iterdir()}
        assert there & set(ADDED) == wanted and there == {p.name for p in paths}
        page = paths[0].read_text()
        assert all(f"]({picture})" in page for picture in wanted)
        assert not re.search(r"\b(None|<NA>|nan|NaN)\b", page)


@pytest.mark.parametrize("name", list(sliced.ALL))
def test_no_text_is_cut_off(found, name):
    for draw, _ in plots.PLOTS.values():
        if drawn := draw(found[name]):
            drawn.draw_without_rendering()
            extent, (width, height) = drawn.get_tightbbox(drawn.canvas.get_renderer()), drawn.get_size_inches()
            assert extent.x0 > -0.02 and extent.y0 > -0.02 and extent.x1 < width + 0.02 and extent.y1 < height + 0.02


@pytest.mark.parametrize("name", list(sliced.ALL))
def test_the_terminal_shows_every_board(name, tmp_path):
    (table,) = report.tables(sliced.ALL[name]())
    with (tmp_path / "out").open("w") as out:
        Console(width=200, file=out).print(table)
    text = (tmp_path / "out").read_text()
    assert re.search(r"softmax +\d\.\d+ \[", text) and ("solved" in text) == (name in ("listops", "digits"))
