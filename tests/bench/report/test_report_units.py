"""Metrics in other units and directions than a share of right answers."""

from __future__ import annotations

import re

import sliced
from sliced import NAMES, ranking, texts

from bench.report import markdown, plots, wording
from bench.report.leaderboard import boards
from bench.report.rows import Measure
from bench.report.statistics import mean_interval


def test_a_metric_without_a_ceiling_has_no_column_of_solved_seeds(found):
    for name in ("language", "forecast"):
        header, lines = ranking(found[name])
        assert "solved" not in header and {len(line) for line in lines.values()} == {len(header)}
        assert "**solved**" not in markdown.page(found[name], {})
    assert "solved" in ranking(found["listops"])[0]


def test_lower_is_better_ranks_and_chooses_upwards(found):
    means = found["language"].table["test_mean"]
    assert means.is_monotonic_increasing and found["language"].table["rank_best"].iloc[-1] == len(NAMES)


def test_an_interval_of_errors_does_not_reach_below_zero():
    wide = [0.01, 0.02, 0.17]
    assert mean_interval(wide)[0] < 0
    low, high = mean_interval(wide, bounds=Measure("mse", "", False, float("nan"), 0.99).bounds)
    assert low == 0 and high > 0.17
    gain = Measure("r2", "", True, float("nan"), 0.99).bounds  # what is better the higher may be negative
    assert mean_interval(wide, bounds=gain)[0] < 0


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
