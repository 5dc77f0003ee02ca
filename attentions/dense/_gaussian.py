"""Gaussian adaptive weights: what the forms of GAAM share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attentions.linear._recurrence import wide

EPS = 1e-8  # the authors', added to a variance
COMBINE = ("product", "sum")


class Gaussians(nn.Module):
    """K Gaussian densities of a standardised number, multiplied (as published) or added, per head; their logarithm.

        y_i = (x - mean - delta_i) / std      log w = combine_i (-y_i^2 / (2 c_i^2) - log c_i)

    Constant factors are left out, as every use normalises the weights. A product of K Gaussians is a Gaussian itself,
    so with "product" K > 1 adds parameters and no new function; with "sum" it is a mixture.

    Args:
        num_heads, num_gaussians: delta and c are [heads, K]; delta starts at 0, log c from N(0, 1).
        combine: product or sum.
    """

    def __init__(self, num_heads: int, num_gaussians: int, combine: str):
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
        self.combine = combine
        self.offset = nn.Parameter(torch.zeros(num_heads, num_gaussians))  # delta
        self.log_scale = nn.Parameter(torch.randn(num_heads, num_gaussians))  # log c

    def forward(self, x: Tensor, mean: Tensor, variance: Tensor, head: int = 0) -> Tensor:
        """log w, shape of x, at least float32; mean and variance broadcast against x."""
        centred, scale = wide(x) - mean, (variance + EPS).rsqrt()
        logs = [
            -(((centred - offset) * scale) * (-log_c).exp()).square() / 2 - log_c
            for offset, log_c in zip(wide(self.offset[head]), wide(self.log_scale[head]), strict=True)
        ]
        if len(logs) == 1:
            return logs[0]
        return torch.stack(logs).sum(0) if self.combine == "product" else torch.stack(logs).logsumexp(0)
