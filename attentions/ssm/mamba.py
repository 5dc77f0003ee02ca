"""Mamba."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._recurrence import masked, wide
from attentions.ssm._convolution import DepthwiseConv
from attentions.ssm._scan import selective_scan


@dataclass(kw_only=True)
class MambaState(State):
    """The SSM's state [B, expand M, N] and the convolution's last inputs [B, conv_size - 1, expand M]."""

    memory: Tensor
    tail: Tensor


class Mamba(Attention):
    """A gated state-space layer that chooses what to write, what to read and how much to forget (selective SSM, S6).

    From x come u = SiLU(conv(W_u x)) and a gate z = W_z x, each `expand` M wide; from u a step size per channel, dt =
    softplus(W_dt W_r u + b), and B and C of N numbers. With a state of N numbers per channel, h_t = exp(dt_t A) h_{t-1}
    + dt_t B_t u_t, y_t = C_t h_t + D u_t, and the output is W_o (y * SiLU(z)). A masked position is a zero to the
    convolution, writes nothing and forgets nothing. It has no heads.

    Noncausal: the same weights run forwards and backwards over the sequence, and the two y are averaged. Cross: the
    state after the whole context, read by every query with its own C and gate; a query does not write, and its
    convolution sees the queries before it.

    The published block stands for attention and MLP in one: at expand 2 it has 6.25 M^2 + (6 N + 14) M parameters,
    2.4 times softmax attention's 4 M^2 at width 32 and 2.0 at width 64.

    Args:
        state_dim: N, numbers of state per channel.
        expand: width of the stream over M.
        conv_size: positions seen by the convolution, own included.
        dt_min, dt_max: range of the initial step sizes, log-uniform.

    Source: Gu & Dao 2023, https://arxiv.org/abs/2312.00752, algorithm 2 and section 3.4; dt's rank ceil(M / 16), biases
    and initialisations (A = -(1, ..., N), S4D-Real) as in the authors' code. Differs: weight decay also acts on A and
    D, which the authors exempt; the noncausal form, with one set of weights, and the cross form are ours.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2312.00752"
    complexity = "T state_dim"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        state_dim: int = 16,
        expand: float = 2,
        conv_size: int = 4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ):
        super().__init__(spec)
        if state_dim < 1:
            raise ValueError(f"state_dim must be at least 1, got {state_dim}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"dt_min must be above 0 and at most dt_max, got dt_min={dt_min} and dt_max={dt_max}; "
                "published: 0.001 and 0.1"
            )
        inner, rank = int(expand * spec.dim), math.ceil(spec.dim / 16)
        if inner < 1:
            raise ValueError(f"expand must be at least 1 / dim, got {expand} for dim={spec.dim}")
        self.sizes = [rank, state_dim, state_dim]
        self.in_proj = nn.Linear(spec.dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv(inner, conv_size, bias=True)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        # parameters, not a Linear layer: a backbone that re-initialises those keeps the step sizes' start
        self.dt_weight = nn.Parameter(torch.empty(inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        dt = torch.empty(inner).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp_min(1e-4)
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())  # softplus of it is dt
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, spec.dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if self.spec.cross:
            assert context is not None
            return self._gate(self._read(self._convolve(u), self._write(context, key_mask)), z)
        u = masked(u, key_mask)
        y, _ = self._scan(self._convolve(u), key_mask)
        if not self.spec.causal:
            back, _ = self._scan(self._convolve(u.flip(1)), None if key_mask is None else key_mask.flip(1))
            y = (y + back.flip(1)) / 2
        return self._gate(y, z)

    def init_state(
        self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> MambaState:
        tail = self.conv.empty_tail(batch_size)
        if context is not None:
            return MambaState(memory=self._write(context, key_mask), tail=tail)
        if self.spec.cross:
            raise ValueError("cross-attention decodes over a context: init_state(batch_size, context)")
        return MambaState(memory=wide(self.A_log.new_zeros(batch_size, *self.A_log.shape)), tail=tail)

    def state_bytes(self, length: int) -> int:
        return 4 * (self.A_log.numel() + self.conv.empty_tail(1).numel())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, MambaState]:
        assert isinstance(state, MambaState)
        inputs, z = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self._convolve(inputs, state.tail), self.conv.next_tail(inputs, state.tail)
        if self.spec.cross:
            y, memory = self._read(u, state.memory), state.memory
        else:
            dt, a, b, c = self._terms(u, None)
            memory = (dt[:, 0, :, None] * a).exp() * state.memory + (dt * wide(u))[:, 0, :, None] * b
            y = (memory * c).sum(-1)[:, None] + wide(u) * wide(self.D)
        return self._gate(y, z), MambaState(memory=memory, tail=tail, position=state.position + 1)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        state = self.init_state(len(x), context, key_mask=key_mask)
        inputs, z = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self._convolve(inputs), self.conv.next_tail(inputs, state.tail)
        y, memory = (self._read(u, state.memory), state.memory) if self.spec.cross else self._scan(u, None)
        return self._gate(y, z), MambaState(memory=memory, tail=tail, position=x.shape[1])

    def _convolve(self, inputs: Tensor, tail: Tensor | None = None) -> Tensor:
        return F.silu(self.conv(inputs, tail))

    def _terms(self, u: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt [B, T, D], A [D, N], B and C [B, T, N]; dt is zero where masked."""
        rank, b, c = self.x_proj(u).split(self.sizes, dim=-1)
        with torch.autocast(u.device.type, enabled=False):
            dt = F.softplus(F.linear(wide(rank), wide(self.dt_weight), wide(self.dt_bias)))
        return masked(dt, key_mask), -wide(self.A_log).exp(), wide(b), wide(c)

    def _scan(self, u: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """y [B, T, D] of a causal sequence, and the state after it."""
        dt, a, b, c = self._terms(u, key_mask)
        with torch.autocast(u.device.type, enabled=False):
            y, memory = selective_scan(wide(u), dt, a, b, c)
        return y + wide(u) * wide(self.D), memory

    def _write(self, context: Tensor, key_mask: Tensor | None) -> Tensor:
        """The state after the whole context."""
        u = self._convolve(masked(self.in_proj(context).chunk(2, dim=-1)[0], key_mask))
        return self._scan(u, key_mask)[1]

    def _read(self, u: Tensor, memory: Tensor) -> Tensor:
        """One state [B, D, N] read by all of u [B, T, D]."""
        *_, c = self._terms(u, None)
        with torch.autocast(u.device.type, enabled=False):
            return c @ memory.mT + wide(u) * wide(self.D)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(y.to(z.dtype) * F.silu(z))
