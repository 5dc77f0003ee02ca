"""Mamba."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._recurrence import masked
from attentions.ssm._convolution import DepthwiseConv
from attentions.ssm._selective import SelectiveSSM


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
        inner, rank = int(expand * spec.dim), math.ceil(spec.dim / 16)
        if inner < 1:
            raise ValueError(f"expand must be at least 1 / dim, got {expand} for dim={spec.dim}")
        self.in_proj = nn.Linear(spec.dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv(inner, conv_size, bias=True)
        self.ssm = SelectiveSSM(inner, state_dim=state_dim, rank=rank, dt_min=dt_min, dt_max=dt_max)
        self.out_proj = nn.Linear(inner, spec.dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if self.spec.cross:
            assert context is not None
            return self._gate(self.ssm.read(self._convolve(u), self._write(context, key_mask)), z)
        u = masked(u, key_mask)
        y, _ = self.ssm.scan(self._convolve(u), key_mask)
        if not self.spec.causal:  # the convolution turns round, too
            back, _ = self.ssm.scan(self._convolve(u.flip(1)), None if key_mask is None else key_mask.flip(1))
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
        return MambaState(memory=self.ssm.empty_memory(batch_size), tail=tail)

    def state_bytes(self, length: int) -> int:
        return 4 * (self.ssm.A_log.numel() + self.conv.empty_tail(1).numel())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, MambaState]:
        assert isinstance(state, MambaState)
        inputs, z = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self._convolve(inputs, state.tail), self.conv.next_tail(inputs, state.tail)
        if self.spec.cross:
            y, memory = self.ssm.read(u, state.memory), state.memory
        else:
            y, memory = self.ssm.advance(u, state.memory)
        return self._gate(y, z), MambaState(memory=memory, tail=tail, position=state.position + 1)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        state = self.init_state(len(x), context, key_mask=key_mask)
        inputs, z = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self._convolve(inputs), self.conv.next_tail(inputs, state.tail)
        y, memory = (self.ssm.read(u, state.memory), state.memory) if self.spec.cross else self.ssm.scan(u)
        return self._gate(y, z), MambaState(memory=memory, tail=tail, position=x.shape[1])

    def _convolve(self, inputs: Tensor, tail: Tensor | None = None) -> Tensor:
        return F.silu(self.conv(inputs, tail))

    def _write(self, context: Tensor, key_mask: Tensor | None) -> Tensor:
        """The state after the whole context."""
        u = self._convolve(masked(self.in_proj(context).chunk(2, dim=-1)[0], key_mask))
        return self.ssm.scan(u, key_mask)[1]

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(y.to(z.dtype) * F.silu(z))
