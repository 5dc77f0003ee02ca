"""Confusion matrices and forecasts of single examples."""

from __future__ import annotations

import numpy as np
import pytest
import sliced

from bench.report import example_plots, figure, slices
from bench.report.frames import Frames
from bench.report.leaderboard import boards


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
    assert list(first.past[0]) == list(range(-48, 0)) and len(second.past[0]) == 0
    assert list(first.target[0]) == list(range(24)) and list(first.forecasts) == names
    np.testing.assert_allclose(first.target[1], np.sin(np.arange(24) / 4))  # of seed 0
    np.testing.assert_allclose(first.past[1], np.sin(np.arange(-48, 0) / 4))
    assert (first.minutes, second.minutes) == (30, None)
    drawn = example_plots.forecasts(board)
    upper, lower = drawn.axes
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("example 1", "example 2")
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
