"""The selective state-space model (S6) on its own: what Mamba holds between its convolution and its gate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.linear._recurrence import masked, wide
from attentions.ssm._scan import selective_scan


class SelectiveSSM(nn.Module):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, per channel with N numbers of state.

    From u come a step size per channel, dt = softplus(W_dt W_r u + b), and B and C of N numbers. A masked position
    writes nothing and forgets nothing.

    Args:
        channels: width of u.
        state_dim: N.
        rank: width of W_r u.
        dt_min, dt_max: range of the initial step sizes, log-uniform.

    Source: Gu & Dao 2023, https://arxiv.org/abs/2312.00752, algorithm 2; initialisations (A = -(1, ..., N), S4D-Real)
    as in the authors' code.
    """

    def __init__(self, channels: int, *, state_dim: int, rank: int, dt_min: float, dt_max: float):
        super().__init__()
        if state_dim < 1:
            raise ValueError(f"state_dim must be at least 1, got {state_dim}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"dt_min must be above 0 and at most dt_max, got dt_min={dt_min} and dt_max={dt_max}; "
                "published: 0.001 and 0.1"
            )
        self.sizes = [rank, state_dim, state_dim]
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        # parameters, not a Linear layer: a backbone that re-initialises those keeps the step sizes' start
        self.dt_weight = nn.Parameter(torch.empty(channels, rank).uniform_(-(rank**-0.5), rank**-0.5))
        dt = torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp_min(1e-4)
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())  # softplus of it is dt
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))

    def scan(self, u: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y [B, T, C] of a causal sequence u [B, T, C], and the state after it [B, C, N]."""
        dt, a, b, c = self._terms(u, key_mask)
        with torch.autocast(u.device.type, enabled=False):
            y, memory = selective_scan(wide(u), dt, a, b, c)
        return y + wide(u) * wide(self.D), memory

    def both_ways(self, u: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """The mean of y forwards and backwards, with one set of weights."""
        back, _ = self.scan(u.flip(1), None if key_mask is None else key_mask.flip(1))
        return (self.scan(u, key_mask)[0] + back.flip(1)) / 2

    def advance(self, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One position: u [B, 1, C] -> y and the next state."""
        dt, a, b, c = self._terms(u, None)
        memory = (dt[:, 0, :, None] * a).exp() * memory + (dt * wide(u))[:, 0, :, None] * b
        return (memory * c).sum(-1)[:, None] + wide(u) * wide(self.D), memory

    def read(self, u: Tensor, memory: Tensor) -> Tensor:
        """One state [B, C, N] read by all of u [B, T, C], which do not write."""
        *_, c = self._terms(u, None)
        with torch.autocast(u.device.type, enabled=False):
            return c @ memory.mT + wide(u) * wide(self.D)

    def empty_memory(self, batch_size: int) -> Tensor:
        """The state before the first position."""
        return wide(self.A_log.new_zeros(batch_size, *self.A_log.shape))

    def _terms(self, u: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt [B, T, C], A [C, N], B and C [B, T, N]; dt is zero where masked."""
        rank, b, c = self.x_proj(u).split(self.sizes, dim=-1)
        with torch.autocast(u.device.type, enabled=False):
            dt = F.softplus(F.linear(wide(rank), wide(self.dt_weight), wide(self.dt_bias)))
        return masked(dt, key_mask), -wide(self.A_log).exp(), wide(b), wide(c)
