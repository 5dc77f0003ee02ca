"""Intervals, ranks and the choice of the learning rate; made for three to ten seeds, honest with one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.95  # of every interval of the report
Interval = tuple[float, float]


def mean_interval(
    values: Sequence[float], level: float = LEVEL, bounds: Interval = (-math.inf, math.inf)
) -> Interval | None:
    """Student-t interval of the mean; None for fewer than two values, which say nothing about their spread.

    Args:
        values: one per seed, finite.
        level: confidence.
        bounds: range of the metric; a mean cannot lie outside, so clipping costs no coverage.

    Source: Student 1908. A percentile bootstrap covers 83 % instead of 95 % at five values.
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean, variance = moments(values)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return max(bounds[0], mean - half), min(bounds[1], mean + half)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its squared standard error, which is NaN for one value."""
    if len(values) < 2:
        return float(values[0]), math.nan
    mean, variance = moments(values)
    return mean, variance / len(values)


def sum_interval(
    total: float, variances: Sequence[float], freedoms: Sequence[int], level: float = LEVEL
) -> Interval | None:
    """Interval of a sum of independent estimates; None when a variance is unknown (NaN) or there is nothing to sum.

    Args:
        total: the sum.
        variances: squared standard error of each term, weights included.
        freedoms: degrees of freedom of each variance.
        level: confidence.

    Source: Satterthwaite 1946, https://doi.org/10.2307/3002019. One term gives Student's interval.
    """
    from scipy.stats import t

    error2 = math.fsum(variances)
    if not variances or math.isnan(error2):
        return None
    if error2 == 0:
        return total, total
    freedom = error2**2 / math.fsum(v**2 / f for v, f in zip(variances, freedoms, strict=True) if v > 0)
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(error2)
    return total - half, total + half


def wilson_interval(successes: int, trials: int, level: float = LEVEL) -> Interval | None:
    """Score interval of a share; None without trials. Source: Wilson 1927, https://doi.org/10.2307/2276774."""
    from scipy.stats import norm

    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie between 0 and trials, got {successes} of {trials}")
    if trials == 0:
        return None
    z2 = float(norm.ppf((1 + level) / 2)) ** 2
    share = successes / trials
    centre = share + z2 / (2 * trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2)))
    scale = 1 + z2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def welch_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of equal means without equal variances; 1 when either has a single value.

    Two samples without any spread differ for certain (0) or not at all (1).
    Source: Welch 1947, https://doi.org/10.2307/2332510.
    """
    from scipy.stats import t

    if min(len(a), len(b)) < 2:
        return 1.0
    (mean_a, variance_a), (mean_b, variance_b) = moments(a), moments(b)
    part_a, part_b = variance_a / len(a), variance_b / len(b)
    error = part_a + part_b
    if error == 0:
        return 1.0 if mean_a == mean_b else 0.0
    freedom = error**2 / (part_a**2 / (len(a) - 1) + part_b**2 / (len(b) - 1))
    return float(2 * t.sf(abs(mean_a - mean_b) / math.sqrt(error), freedom))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses fall when all tests together may err with probability alpha. Source: Holm 1979."""
    rejected = [False] * len(p_values)
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (len(p_values) - step):
            break
        rejected[index] = True
    return rejected


def separated(samples: Sequence[Sequence[float]], level: float = LEVEL) -> np.ndarray:
    """[N, N] bool: [i, j] is True when the tests of row i separate it from row j.

    Row i is tested against every other row by Welch's test, with Holm's correction over those N - 1 tests, so the
    rank interval of a row, read by itself, covers its true rank with `level` (the marginal confidence sets of
    Mogstad, Romano, Shaikh and Wilhelm, see Chetverikov et al. 2024, https://arxiv.org/abs/2401.15205, section 2).
    What is not separated is a tie, so a row with one seed ties with all. Not symmetric: a row whose seeds scatter may
    be unable to tell its own place while a steady one is sure of its. Welch and not a paired test: at three seeds
    pairing would leave 2 degrees of freedom of up to 4.
    """
    n = len(samples)
    p = np.ones((n, n))
    for i in range(n):
        for j in range(i):
            p[i, j] = p[j, i] = welch_p(samples[i], samples[j])
    apart = np.zeros((n, n), dtype=bool)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        apart[i, others] = holm([p[i, j] for j in others], 1 - level)
    return apart


def rank_intervals(
    samples: Sequence[Sequence[float]],
    *,
    higher_is_better: bool = True,
    whole: Sequence[bool] | None = None,
    level: float = LEVEL,
) -> list[tuple[int, int]]:
    """(best, worst) rank of each row that the seeds leave possible; 1 is the best of all.

    Args:
        samples: values per row, one seed or more.
        whole: False where seeds failed; such a row is never better than another on the strength of its survivors.
        level: see `separated`.
    """
    apart = separated(samples, level)
    sign = 1.0 if higher_is_better else -1.0
    means = np.array([sign * float(np.mean(values)) for values in samples])
    complete = np.ones(len(samples), dtype=bool) if whole is None else np.array(whole, dtype=bool)
    above = apart & (means[None, :] > means[:, None]) & complete[None, :]  # [i, j]: j is better, as i's tests see it
    below = apart & (means[None, :] < means[:, None]) & complete[:, None]
    return [(1 + int(a), len(samples) - int(b)) for a, b in zip(above.sum(1), below.sum(1), strict=True)]


def choose_rate(valid: Mapping[float, Mapping[int, float | None]], *, higher_is_better: bool = True) -> float | None:
    """The learning rate of a mechanism, by `valid` alone; None when no run succeeded.

    Rates are compared over the seeds recorded at every rate (over all seeds when there is no such seed). Fewest
    failed seeds first, then the best mean, then the smaller rate.

    Args:
        valid: rate -> seed -> primary metric on valid, None for a failed run.
    """
    common = set.intersection(*(set(seeds) for seeds in valid.values())) if valid else set()
    keys = []
    for rate, seeds in valid.items():
        chosen = [value for seed, value in seeds.items() if seed in common or not common]
        good = [value for value in chosen if value is not None]
        if good:
            mean = float(np.mean(good))
            keys.append((len(chosen) - len(good), -mean if higher_is_better else mean, rate))
    return min(keys)[2] if keys else None


def edge(rate: float, grid: Sequence[float]) -> str | None:
    """'smallest' or 'largest' when the rate ends a grid of two or more, so the optimum may lie outside; else None."""
    if len(set(grid)) < 2 or min(grid) < rate < max(grid):
        return None
    return "smallest" if rate == min(grid) else "largest"


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased variance of two values or more; exact for equal values, whose mean may round away from them."""
    if min(values) == max(values):
        return float(values[0]), 0.0
    return float(np.mean(values)), float(np.var(values, ddof=1))
