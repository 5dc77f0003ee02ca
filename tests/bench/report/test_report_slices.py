"""Slices by kind: heat maps for words, curves for numbers, and the files that they become."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sliced
from rich.console import Console
from sliced import NAMES, OPERATORS, POSITIONS, SINCE, lines_of

from bench import report
from bench.report import figure, files, markdown, plots, slice_plots, slices
from bench.report.frames import Frames
from bench.report.leaderboard import boards

ADDED = "slices.png", "curves.png", "confusion.png", "traces.png"


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


def test_a_kind_with_one_value_is_no_kind(found):
    rows = found["listops"].slices
    one = rows[(rows["slice_key"] != "operator") | (rows["slice_value"] == "MAX")]
    assert set(slices.kinds(rows)) - set(slices.kinds(one)) == {"operator"}


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
