"""Based's linear attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attentions.base import LayerSpec
from attentions.linear._recurrence import Recurrent


class Based(Recurrent):
    """Linear attention with the Taylor series of exp as kernel: 1 + s + s^2 / 2, s = q.k / sqrt(f), normalised.

    The features of x are 1, x_i / f^(1/4), x_i^2 / sqrt(2 f) and x_i x_j / sqrt(f) for i < j: the symmetric half of
    the second-order part, with the same inner products. Their width is 1 + f + f (f + 1) / 2, 153 for f = 16, and the
    state has G times that by D + 1 numbers per sequence. Inside a chunk the series acts on the scores.

    Args:
        feature_dim: width f of one head of q and k.

    Source: Arora et al. 2024 (Based), https://arxiv.org/abs/2402.18668, section 4.1 and eq. 4.
    Differs: the authors' code keeps the full x x^T (273 features for f = 16). Their architecture alternates this layer
    with sliding windows and short convolutions; that is the row `based_hybrid`.
    """

    paper = "https://arxiv.org/abs/2402.18668"
    normalised = True
    chunk_size = 128  # wide features make a longer chunk cheaper than another read of the memory

    def __init__(self, spec: LayerSpec, *, feature_dim: int = 16):
        if feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, got {feature_dim}")
        super().__init__(spec, key_dim=feature_dim)

    def features(self, heads: Tensor) -> Tensor:
        # each pair once, as (i, i + d mod f): whole slices, where gathering pairs has a slow backward
        dim = self.key_dim
        x = heads * dim**-0.25
        twice = torch.cat([x, x], dim=-1)
        pairs = [x * twice[..., d : d + dim] for d in range(1, (dim + 1) // 2)]
        if dim % 2 == 0:
            pairs.append(x[..., : dim // 2] * x[..., dim // 2 :])  # at distance f / 2 both halves hold the same pairs
        return torch.cat([torch.ones_like(x[..., :1]), x, x.square() / math.sqrt(2), *pairs], dim=-1)

    def score(self, product: Tensor) -> Tensor:
        s = product / math.sqrt(self.key_dim)
        return 1 + s + s.square() / 2
