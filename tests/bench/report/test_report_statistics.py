"""Intervals, ranks and selection against scipy, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bench.report.statistics import (
    choose_rate,
    edge,
    holm,
    mean_interval,
    rank_intervals,
    welch_p,
    wilson_interval,
)

SOLVED, HIGH, LOW = [1.0, 0.999, 1.0], [0.91, 0.9, 0.92], [0.11, 0.1, 0.12]


@pytest.mark.parametrize("n", [2, 3, 5, 11])
def test_mean_interval_equals_scipy(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert mean_interval(values, 0.9) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_mean_interval_of_two_values_has_the_closed_form():
    half = math.tan(0.475 * math.pi) * 1.0 / math.sqrt(2) * math.sqrt(2)  # Student-t with 1 degree of freedom is Cauchy
    assert mean_interval([4.0, 6.0]) == pytest.approx((5 - half, 5 + half), rel=1e-12)


def test_one_value_has_no_interval():
    assert mean_interval([0.7]) is None


def test_equal_values_have_an_interval_without_width():
    assert mean_interval([0.1] * 3) == (0.1, 0.1)  # np.mean([0.1] * 3) is not 0.1


def test_interval_stays_within_the_bounds_of_the_metric():
    low, high = mean_interval([0.9, 1.0, 0.8], bounds=(0.0, 1.0))
    assert 0 < low < 0.9 and high == 1.0


def test_t_interval_covers_95_percent_at_five_seeds():
    # 4000 intervals: the standard error of the share is 0.35 %, so 93 to 97 % is more than five of them
    samples = np.random.default_rng(7).normal(0.5, 0.1, (4000, 5))
    covered = [low <= 0.5 <= high for low, high in map(mean_interval, samples)]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize(("successes", "trials"), [(0, 3), (1, 3), (3, 3), (5, 7), (50, 101)])
def test_wilson_interval_equals_scipy(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_covers_95_percent_on_average_over_shares():
    # exact, by the binomial law: over shares 0.05 .. 0.95 at eleven trials; no interval for a share does it pointwise
    trials, shares = 11, np.linspace(0.05, 0.95, 181)
    intervals = [wilson_interval(k, trials) for k in range(trials + 1)]
    covers = np.array([[low <= p <= high for low, high in intervals] for p in shares])
    weight = stats.binom.pmf(np.arange(trials + 1)[None, :], trials, shares[:, None])
    assert 0.93 < (covers * weight).sum(1).mean() < 0.97


def test_wilson_interval_refuses_impossible_counts():
    assert wilson_interval(0, 0) is None
    with pytest.raises(ValueError, match="5 of 3"):
        wilson_interval(5, 3)


def test_welch_equals_scipy():
    random = np.random.default_rng(3)
    a, b = random.normal(0, 1, 3), random.normal(1, 5, 7)
    assert welch_p(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-10)


def test_welch_without_spread_is_certain_and_with_one_value_knows_nothing():
    assert welch_p([1.0] * 3, [1.0] * 3) == 1.0
    assert welch_p([1.0] * 3, [0.5] * 3) == 0.0
    assert welch_p([1.0], [0.0, 0.1, 0.2]) == 1.0
    assert welch_p([1.0] * 3, [0.1] * 2 + [0.2]) < 0.05  # one side without spread is an ordinary case


def test_holm_steps_down_and_stops_at_the_first_that_stands():
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.02, 0.02, 0.02], 0.05) == [False] * 3  # each below 0.05, none below 0.05 / 3
    assert holm([], 0.05) == []


def test_clear_differences_at_three_seeds_rank_apart():
    assert rank_intervals([LOW, SOLVED, HIGH]) == [(3, 3), (1, 1), (2, 2)]
    assert rank_intervals([LOW, SOLVED, HIGH], higher_is_better=False) == [(1, 1), (3, 3), (2, 2)]


def test_what_cannot_be_separated_is_a_tie():
    scattered = [0.95, 0.5, 0.99]
    # the low row is sure of its place, the scattered one is not of its own
    assert rank_intervals([SOLVED, scattered, LOW]) == [(1, 2), (1, 3), (3, 3)]
    assert rank_intervals([[1.0] * 3, [1.0] * 3, LOW]) == [(1, 2), (1, 2), (3, 3)]


def test_a_single_seed_ties_with_everything():
    assert rank_intervals([[0.5], SOLVED, LOW]) == [(1, 3), (1, 2), (2, 3)]
    assert rank_intervals([[1.0], [0.5], [0.0]]) == [(1, 3)] * 3
    assert rank_intervals([[1.0]]) == [(1, 1)]
    assert rank_intervals([]) == []


def test_a_row_with_failed_seeds_is_never_better_but_may_be_worse():
    assert rank_intervals([SOLVED, HIGH, LOW], whole=[False, True, True]) == [(1, 3), (1, 2), (2, 3)]
    assert rank_intervals([SOLVED, HIGH, LOW], whole=[True, True, False]) == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("n", [3, 5])
def test_rank_intervals_cover_the_true_ranks(n):
    # two levels of three equal mechanisms, unequal spreads; 900 rows, standard error 0.7 %
    random = np.random.default_rng(n)
    means, spreads = np.repeat([0.9, 0.5], 3), np.array([0.002, 0.03, 0.1] * 2)
    truth = [(1, 3)] * 3 + [(4, 6)] * 3
    missed, apart = 0, 0
    for _ in range(150):
        found = rank_intervals(list(means[:, None] + spreads[:, None] * random.normal(size=(6, n))))
        missed += sum(f[0] > t[0] or f[1] < t[1] for f, t in zip(found, truth, strict=True))
        apart += sum(f == t for f, t in zip(found, truth, strict=True))
    assert missed / 900 < 0.06
    assert apart / 900 > (0.1 if n == 3 else 0.5)  # and they say something


def test_learning_rate_is_the_best_mean_of_valid():
    valid = {0.001: {0: 0.5, 1: 0.6}, 0.01: {0: 0.9, 1: 0.4}, 0.1: {0: 0.1, 1: 0.95}}
    assert choose_rate(valid) == 0.01
    assert choose_rate(valid, higher_is_better=False) == 0.1
    assert choose_rate({0.01: {0: 1.0}, 0.001: {0: 1.0}}) == 0.001  # a tie goes to the smaller rate


def test_a_rate_with_failed_seeds_ranks_below_a_complete_one():
    assert choose_rate({0.01: {0: 1.0, 1: None, 2: 1.0}, 0.001: {0: 0.2, 1: 0.2, 2: 0.2}}) == 0.001
    assert choose_rate({0.01: {0: None, 1: None, 2: 0.9}, 0.001: {0: 0.2, 1: None, 2: 0.2}}) == 0.001
    assert choose_rate({0.01: {0: None}, 0.001: {0: None}}) is None
    assert choose_rate({}) is None


def test_rates_are_compared_on_the_seeds_they_share():
    assert choose_rate({0.01: {0: 0.8, 1: 0.1, 2: 0.1}, 0.001: {0: 0.7}}) == 0.01


def test_edges_of_the_grid():
    grid = [0.003, 0.01, 0.03]
    assert [edge(rate, grid) for rate in grid] == ["smallest", None, "largest"]
    assert edge(0.01, [0.01, 0.01]) is None
