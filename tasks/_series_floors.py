"""What a forecast is worth: the season before, and a linear model of the window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]

ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of the ridge penalty
FITTED = 60_000  # windows of single variables at most; evenly spaced where there are more
CHUNK = 20_000  # windows of single variables predicted at once


def seasonal(values: Array, ahead: Array, horizon: int, period: int) -> Array:
    """The latest value before the horizon that stood a whole number of periods earlier.

    Args:
        values: [T, V], NaN where there is none: then the value of an earlier period counts, or 0, the mean.
        ahead: [N], first row of each horizon.
        period: in rows.

    Returns:
        [N, horizon, V].
    """
    whole = -(-len(values) // period) * period
    by_phase = np.full((whole, values.shape[1]), np.nan)
    by_phase[: len(values)] = values
    by_phase = by_phase.reshape(-1, period, values.shape[1])
    place = np.where(np.isnan(by_phase), 0, np.arange(len(by_phase))[:, None, None])
    filled = np.take_along_axis(by_phase, np.maximum.accumulate(place, 0), 0).reshape(whole, -1)
    step = np.arange(horizon)
    rows = ahead[:, None] + step - period * (step // period + 1)
    return np.where(rows[..., None] < 0, 0.0, np.nan_to_num(filled[np.maximum(rows, 0)]))


def ridge(pasts: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> float:
    """MSE on test of a ridge regression from [N, L, V] to [N, P, V], one matrix for all V, penalty chosen on valid.

    Source: the linear baseline of Zeng et al. 2022 (DLinear), https://arxiv.org/abs/2205.13504, without its
    decomposition, which a linear map of the whole window contains, and by least squares instead of gradient steps.
    """
    from sklearn.linear_model import Ridge

    def flat(windows: Tensor) -> Array:
        return windows.transpose(1, 2).flatten(0, 1).numpy().astype(np.float64)

    def error(model: Any, split: str) -> float:
        total, chunk = 0.0, max(1, CHUNK // pasts[split].shape[2])
        for start in range(0, len(pasts[split]), chunk):
            rows = slice(start, start + chunk)
            total += np.square(model.predict(flat(pasts[split][rows])) - flat(targets[split][rows])).sum()
        return float(total / targets[split].numel())

    stride = -(-pasts["train"].shape[0] * pasts["train"].shape[2] // FITTED)
    known, wanted = flat(pasts["train"][::stride]), flat(targets["train"][::stride])
    models = [Ridge(alpha=alpha).fit(known, wanted) for alpha in ALPHAS]
    return error(min(models, key=lambda model: error(model, "valid")), "test")
