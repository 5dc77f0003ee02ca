"""Based's linear attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attentions.base import LayerSpec
from attentions.linear._recurrence import Recurrent

FEATURES = ("packed", "full")


class Based(Recurrent):
    """Linear attention with the Taylor series of exp as kernel: 1 + s + s^2 / 2, s = q.k / sqrt(f), normalised.

    The features of x are 1, x_i / f^(1/4), and the second-order part. `packed`: x_i^2 / sqrt(2 f) and x_i x_j / sqrt(f)
    for i < j, 1 + f + f (f + 1) / 2 features in all, 153 for f = 16. `full`: every x_i x_j / sqrt(2 f), 1 + f + f^2 or
    273 features. Inner products are the same; the state has G times that by D + 1 numbers per sequence. Inside a chunk
    the series acts on the scores. No weight is below 1/2, so the denominator needs no care: the authors' eps of 1e-12
    is lost in rounding.

    Args:
        feature_dim: width f of one head of q and k.
        features: packed (half the state) or full (the authors' training code).

    Source: Arora et al. 2024 (Based), https://arxiv.org/abs/2402.18668, section 4.1 and eq. 4.
    Differs: the authors' code adds 1e-12 to the denominator, here it is at least that. Their architecture sets this
    layer among sliding windows and convolutions: the rows `based_hybrid` and, in their order, `based_hybrid_paper`.
    """

    paper = "https://arxiv.org/abs/2402.18668"
    normalised = True
    chunk_size = 128  # wide features make a longer chunk cheaper than another read of the memory

    def __init__(self, spec: LayerSpec, *, feature_dim: int = 16, features: str = "packed"):
        if feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, got {feature_dim}")
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features}")
        super().__init__(spec, key_dim=feature_dim)
        self.full = features == "full"

    def features(self, heads: Tensor) -> Tensor:
        x = heads * self.key_dim**-0.25
        return torch.cat([torch.ones_like(x[..., :1]), x, *self._second(x)], dim=-1)

    def _second(self, x: Tensor) -> list[Tensor]:
        """Products of two channels, whose inner products are (q.k)^2 / 2."""
        dim = self.key_dim
        if self.full:
            return [(x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)]
        # each pair once, as (i, i + d mod f): whole slices, where gathering pairs has a slow backward
        twice = torch.cat([x, x], dim=-1)
        pairs = [x * twice[..., d : d + dim] for d in range(1, (dim + 1) // 2)]
        if dim % 2 == 0:
            pairs.append(x[..., : dim // 2] * x[..., dim // 2 :])  # at distance f / 2 both halves hold the same pairs
        return [x.square() / math.sqrt(2), *pairs]

    def score(self, product: Tensor) -> Tensor:
        s = product / math.sqrt(self.key_dim)
        return 1 + s + s.square() / 2
