"""CAB's composite index: how far a mechanism stands above a named reference set, over tasks, over patterns.

    z = sign (x - mu) / sigma                   of one metric; sign is -1 where lower is better
    task = mean z of its metrics;  pattern = mean over its tasks;  composite = mean over patterns

mu and sigma (ddof=1) are the mean and SD of the mechanisms of the reference set. A cell is one (pattern, task,
metric). A mechanism without a value in a cell is left out of the means, never given one; `cells` of `cells_all`
says how many it has. Beside z, which one far-off value of the reference set can squash, stands the mean rank with
the same nesting of means.

Source: Zhang et al. 2023, CAB, https://arxiv.org/abs/2210.07661, section 4. Differs: the reference set is named and
read from the data (`cab2022` holds CAB's frozen numbers), a perplexity may be taken as its logarithm, and seeds give
an interval.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from bench.report import statistics

CELL = ["pattern", "task", "metric"]
PATTERNS = "noncausal self", "causal self", "noncausal cross", "causal cross"
LOGARITHMIC = "perplexity", "ppl"  # their differences count as ratios: 3 -> 6 is as much as 30 -> 60


def cab2022() -> pd.DataFrame:
    """The frozen mu and sigma of CAB's published leaderboards: CELL, higher_is_better, mean, sd."""
    return pd.read_csv(Path(__file__).with_name("cab2022.csv"), comment="#")


def averaged(scores: pd.DataFrame, logarithmic: Collection[str] = ()) -> pd.DataFrame:
    """Seeds to cells.

    Args:
        scores: one row per seed: CELL, attention, higher_is_better, value. Further columns are kept if they are equal
            within a cell and mechanism.
        logarithmic: metrics of which log(value) is taken, before the mean.

    Returns:
        One row per cell and mechanism: the columns of `scores` with `value` the mean over seeds, `error2` the squared
        standard error of that mean (missing for one seed) and `freedom`, seeds - 1.

    Raises:
        ValueError: a logarithm of a value that is not positive.
    """
    logs = scores["metric"].isin(list(logarithmic))
    if (scores.loc[logs, "value"] <= 0).any():
        raise ValueError(f"the logarithm needs positive values, got {scores.loc[logs, 'value'].min():g}")
    scores = scores.assign(value=scores["value"].where(~logs, np.log(scores["value"].where(logs, 1.0))))
    rows = []
    for _, own in scores.groupby([*CELL, "attention"], sort=False):
        mean, error2 = statistics.mean_error(own["value"].tolist())
        rows.append({**own.iloc[0].to_dict(), "value": mean, "error2": error2, "freedom": len(own) - 1})
    return pd.DataFrame(rows, columns=[*scores.columns, "error2", "freedom"])


def reference(cells: pd.DataFrame, names: Collection[str]) -> pd.DataFrame:
    """Mean and SD of the reference set in every cell.

    Args:
        cells: see `averaged`; CELL, attention and value are read.
        names: the mechanisms of the reference set.

    Returns:
        CELL, mean, sd, size (members with a value), why ('' or why there is no z: fewer than two members or no spread).
    """
    rows = []
    for cell, own in cells.groupby(CELL, sort=False):
        values = own.loc[own["attention"].isin(list(names)), "value"].dropna().tolist()
        mean, sd, why = np.nan, np.nan, ""
        if len(values) < 2:
            why = f"the reference set has {len(values)} of the 2 values that a spread needs"
        else:
            mean, variance = statistics.moments(values)
            sd = float(np.sqrt(variance))
            why = "" if sd > 0 else f"all {len(values)} values of the reference set are equal"
        rows.append([*cell, mean, sd, len(values), why])
    return pd.DataFrame(rows, columns=[*CELL, "mean", "sd", "size", "why"])


def standardised(cells: pd.DataFrame, constants: pd.DataFrame) -> pd.DataFrame:
    """`cells` with `z`, larger is better, and `z_error2`; missing where `constants` has no mean or no spread."""
    known = constants.loc[constants["sd"] > 0, [*CELL, "mean", "sd"]]
    out = cells.merge(known, on=CELL, how="left", validate="many_to_one")
    sign = np.where(out["higher_is_better"].astype(bool), 1.0, -1.0)
    z = sign * (out["value"] - out["mean"]) / out["sd"]
    return out.drop(columns=["mean", "sd"]).assign(z=z, z_error2=out["error2"] / out["sd"] ** 2)


def ranked(cells: pd.DataFrame) -> pd.DataFrame:
    """`cells` with `rank` by value within each cell, 1 is the best; equal values share the mean of their ranks."""
    signed = cells["value"] * np.where(cells["higher_is_better"].astype(bool), -1.0, 1.0)
    return cells.assign(rank=signed.groupby([cells[name] for name in CELL]).rank(method="average"))


def by_task(cells: pd.DataFrame, column: str = "z") -> pd.Series:
    """Mean over a task's metrics, by (attention, pattern, task)."""
    return cells.groupby(["attention", "pattern", "task"])[column].mean()  # pandas leaves missing values out


def by_pattern(cells: pd.DataFrame, column: str = "z") -> pd.Series:
    """Mean over a pattern's tasks of the mean over their metrics, by (attention, pattern)."""
    return by_task(cells, column).groupby(["attention", "pattern"]).mean()


def overall(cells: pd.DataFrame, column: str = "z") -> pd.Series:
    """Mean over patterns, by attention."""
    return by_pattern(cells, column).groupby("attention").mean()


def summary(cells: pd.DataFrame, baseline: str = "softmax") -> pd.DataFrame:
    """One row per mechanism, the best index first; those with a cell missing stand below those without.

    Args:
        cells: of `standardised`, with a column `rank` (see `ranked`).
        baseline: the mechanism to which the difference is taken.

    Returns:
        attention
        composite, composite_low, composite_high: the index and its interval over seeds, see `intervals`
        to_baseline: the same means over the differences of z to the baseline, in the cells that both have
        mean_rank: over patterns
        cells, cells_all: with a value, and in all
    """
    base = cells.loc[cells["attention"] == baseline].set_index(CELL)["z"].rename("base")
    cells = cells.join(base, on=CELL)
    cells["difference"] = cells["z"] - cells["base"]
    out = pd.DataFrame({"composite": overall(cells)}).join(intervals(cells))
    out["to_baseline"] = overall(cells, "difference")
    out["mean_rank"] = overall(cells, "rank")
    out["cells"] = cells.groupby("attention")["value"].count()
    out["cells_all"] = len(cells[CELL].drop_duplicates())
    return out.reset_index().sort_values(
        ["cells", "composite", "mean_rank", "attention"],
        key=lambda c: -c if c.name in ("cells", "composite") else c,
        ignore_index=True,
    )


def intervals(cells: pd.DataFrame) -> pd.DataFrame:
    """`composite_low` and `composite_high` by attention; missing where a cell has one seed.

    The index is a weighted sum of independent means, so its squared error is the weighted sum of theirs, with the
    degrees of freedom of Welch and Satterthwaite. The reference set's mean and SD count as given: what is uncertain
    is this mechanism, not the yardstick. Cells are independent when each has runs of its own: one metric per task.
    """
    have = cells[cells["z"].notna()]
    weight = 1.0 / have.groupby(["attention", "pattern", "task"])["z"].transform("count")
    for levels in (["attention", "pattern"], ["attention"]):  # tasks of the pattern, patterns of the mechanism
        below = "task" if len(levels) == 2 else "pattern"
        weight = weight / have.groupby(levels)[below].transform("nunique")
    index, rows = overall(have), {}
    for name, own in have.assign(part=weight**2 * have["z_error2"]).groupby("attention"):
        parts, freedoms = own["part"].tolist(), own["freedom"].tolist()
        found = statistics.sum_interval(index[name], parts, freedoms)
        rows[name] = found or (np.nan, np.nan)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["composite_low", "composite_high"], dtype=float)
