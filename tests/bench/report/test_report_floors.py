"""What trivial solvers reach: in the table, under the ranked rows, on the page and in the plots."""

from __future__ import annotations

import pytest
import sliced
from sliced import texts

from bench.report import files, group, group_page, markdown, plots, wording
from bench.report.leaderboard import FLOORS, boards


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
    assert lines["(root operator)"][-1] == "reference: given more, or a part of the answer"
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
