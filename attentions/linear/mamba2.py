"""Mamba-2."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._recurrence import Memory, masked, scan, step_bias, wide, width, write
from attentions.ssm._convolution import DepthwiseConv


@dataclass(kw_only=True)
class Mamba2State(Memory):
    """h [B, H, N, P], and the last conv_size - 1 projections of C and of x and B [B, conv_size - 1, channels].

    In cross-attention x and B have no tail: the context is complete.
    """

    query_tail: Tensor
    tail: Tensor | None


class Mamba2(Attention):
    """A state space whose decay is one number per head and position: linear attention with the name of a state space.

    h_t = exp(-exp(A) dt_t) h_{t-1} + dt_t B_t x_t^T,  y_t = C_t h_t + D x_t,  dt_t = softplus(w.u_t + b),
    out = W RMSNorm(y * silu(z)). C, B and x are query, key and value; x, B and C pass a short causal convolution and
    SiLU; one B and one C serve the heads of a group. With expand = 2 the layer has 6 M^2 + 2 M N parameters, where
    softmax has 4 M^2 (the authors drop the MLP). Noncausal: the recurrence runs from either end with the same weights,
    convolutions included, and the two y are averaged. Cross: dt, B and x come from the context and h is its last
    state; C and z come from the queries, whose convolution is causal; no D, as a query has no x of its own.

    Args:
        state_dim: width N of B and C.
        expand: inner width over M.
        head_dim: width P of one head of x, a divisor of expand * dim; None: expand * M / H, rounded down.
        num_groups: pairs of B and C, a divisor of the heads. Grouped key-value heads of the backbone do not enter.
        conv_size: kernel of the short convolution, in positions.

    Source: Dao & Gu 2024, https://arxiv.org/abs/2405.21060, sections 6 and 7, figure 6; convolution bias, norm after
    the gate and the start (exp(A) uniform in [1, 16], softplus(b) log-uniform in [0.001, 0.1], D = 1) from the authors'
    code. Differs: the in-projection is two matrices, one per stream; noncausal and cross forms are ours; positions of
    the backbone (rotary) do not enter.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2405.21060"
    complexity = "T"
    chunk_size: int = 64

    def __init__(
        self,
        spec: LayerSpec,
        *,
        state_dim: int = 128,
        expand: float = 2.0,
        head_dim: int | None = 64,
        num_groups: int = 1,
        conv_size: int = 4,
    ):
        super().__init__(spec)
        if state_dim < 1:
            raise ValueError(f"state_dim must be at least 1, got {state_dim}")
        self.head_dim = width(spec, expand) if head_dim is None else head_dim
        self.inner = spec.num_heads * self.head_dim if head_dim is None else int(expand * spec.dim)
        divisors = [d for d in range(1, self.inner + 1) if self.inner % d == 0] or [1]
        if self.head_dim not in divisors:
            near = min(divisors, key=lambda d: abs(d - self.head_dim))
            raise ValueError(f"head_dim must divide expand * dim = {self.inner}, got {head_dim}; nearest: {near}")
        self.num_heads = self.inner // self.head_dim
        if num_groups < 1 or self.num_heads % num_groups:
            near = max(d for d in range(1, max(1, num_groups) + 1) if self.num_heads % d == 0)
            raise ValueError(f"num_groups must divide the {self.num_heads} heads, got {num_groups}; nearest: {near}")
        self.state_dim, self.num_groups = state_dim, num_groups
        shared = num_groups * state_dim
        self.read_splits, self.write_splits = (self.inner, shared), (self.inner + shared, self.num_heads)
        self.read_proj = nn.Linear(spec.dim, sum(self.read_splits), bias=False)  # z, C
        self.write_proj = nn.Linear(spec.dim, sum(self.write_splits), bias=False)  # x and B, dt
        self.query_conv = DepthwiseConv(shared, conv_size, bias=True)
        self.conv = DepthwiseConv(self.inner + shared, conv_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(step_bias(self.num_heads))
        self.D = None if spec.cross else nn.Parameter(torch.ones(self.num_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, spec.dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        if self.spec.cross:
            state = self.init_state(x.shape[0], context, key_mask=key_mask)
            z, raw = self.read_proj(x).split(self.read_splits, dim=-1)
            return self._merge(z, self._read(self._queries(raw), state.memory))
        z, raw = self.read_proj(masked(x, key_mask)).split(self.read_splits, dim=-1)
        written = self.write_proj(masked(x, key_mask))
        y = self._run(raw, written, key_mask)
        if not self.spec.causal:
            mask = None if key_mask is None else key_mask.flip(1)
            y = (y + self._run(raw.flip(1), written.flip(1), mask).flip(1)) / 2
        return self._merge(z, y)

    def _run(self, raw: Tensor, written: Tensor, key_mask: Tensor | None) -> Tensor:
        """y [B, T, H, P] of a causal sequence, from the projections of C and of x, B, dt."""
        k, x, v, decay = self._terms(written, key_mask)
        with torch.autocast(raw.device.type, enabled=False):
            y = scan(self._queries(raw), k, v, log_decay=decay, chunk_size=self.chunk_size)
            return y + self._skip(x)

    # -- decoding ---------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> Mamba2State:
        memory = wide(self.A_log.new_zeros(batch_size, self.num_heads, self.state_dim, self.head_dim))
        query_tail, tail = self.query_conv.empty_tail(batch_size), self.conv.empty_tail(batch_size)
        if not self.spec.cross:
            return Mamba2State(memory=memory, query_tail=query_tail, tail=tail)
        if context is None:
            raise ValueError("cross-attention reads a context: pass context [B, S, M]")
        k, _, v, decay = self._terms(self.write_proj(masked(context, key_mask)), key_mask)
        with torch.autocast(context.device.type, enabled=False):
            return Mamba2State(memory=write(memory, k, v, log_decay=decay), query_tail=query_tail, tail=None)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, Mamba2State]:
        z, q, value, state = self._advance(x, state)
        y = self._read(q, state.memory)
        return self._merge(z, y if value is None else y + self._skip(value)), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        *_, state = self._advance(x, self.init_state(x.shape[0], context, key_mask=key_mask))
        return self.forward(x, context, key_mask=key_mask), state

    def state_bytes(self, length: int) -> int:
        channels = self.query_conv.weight.shape[0] + (0 if self.spec.cross else self.conv.weight.shape[0])
        return 4 * (self.inner * self.state_dim + (self.conv.kernel_size - 1) * channels)

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor | None, Mamba2State]:
        """z, C and x of some positions (cross: no x), and the state after them."""
        assert isinstance(state, Mamba2State)
        z, raw = self.read_proj(x).split(self.read_splits, dim=-1)
        q, value = self._queries(raw, state.query_tail), None
        query_tail = self.query_conv.next_tail(raw, state.query_tail)
        state = dataclasses.replace(state, query_tail=query_tail, position=state.position + x.shape[1])
        if state.tail is not None:
            written = self.write_proj(x)
            k, value, v, decay = self._terms(written, None, state.tail)
            tail = self.conv.next_tail(written[..., : self.write_splits[0]], state.tail)
            with torch.autocast(x.device.type, enabled=False):
                memory = write(state.memory, k, v, log_decay=decay)
            state = dataclasses.replace(state, memory=memory, tail=tail)
        return z, q, value, state

    # -- the block --------------------------------------------------------------------------------

    def _queries(self, raw: Tensor, tail: Tensor | None = None) -> Tensor:
        """C [B, T, H, N], or [B, T, 1, N] where all heads share it."""
        return self._shared(F.silu(self.query_conv(raw, tail)))

    def _terms(
        self, written: Tensor, key_mask: Tensor | None, tail: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """B [B, S, H or 1, N], x and dt x [B, S, H, P], log decay [B, S, H]; a masked position has dt = 0."""
        raw, step = written.split(self.write_splits, dim=-1)
        x, k = F.silu(self.conv(raw, tail)).split([self.inner, raw.shape[-1] - self.inner], dim=-1)
        x = wide(x).unflatten(-1, (self.num_heads, self.head_dim))
        step = masked(F.softplus(wide(step) + wide(self.dt_bias)), key_mask)
        return self._shared(k), x, x * step[..., None], -wide(self.A_log).exp() * step

    def _shared(self, channels: Tensor) -> Tensor:
        groups = wide(channels).unflatten(-1, (self.num_groups, self.state_dim))
        return groups if self.num_groups == 1 else groups.repeat_interleave(self.num_heads // self.num_groups, dim=2)

    def _skip(self, x: Tensor) -> Tensor:
        assert self.D is not None
        return x * wide(self.D)[:, None]

    def _read(self, q: Tensor, memory: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return (q.transpose(1, 2) @ memory).transpose(1, 2)

    def _merge(self, z: Tensor, y: Tensor) -> Tensor:
        """W RMSNorm(y * silu(z)), normed group by group."""
        gated = (y.flatten(2) * F.silu(wide(z))).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=1e-5).flatten(2) * self.norm_weight
        return self.out_proj(normed.to(self.out_proj.weight.dtype))
