"""A budget per row: the largest scores of each, as a mask."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def largest_mask(scores: Tensor, budget: Tensor, most: int) -> Tensor:
    """The `budget` largest scores of each row, the first among equals: [..., N] -> [..., N] bool.

    Args:
        budget: [..., 1] int64, broadcast to the rows of scores, each from 1 to `most`; most: at most N.
    """
    last = (budget - 1).expand(*scores.shape[:-1], 1)
    least = scores.topk(most).values.gather(-1, last)
    above, equal = scores > least, scores == least
    return above | equal & (equal.cumsum(-1, dtype=torch.int32) <= budget - above.sum(-1, keepdim=True))
