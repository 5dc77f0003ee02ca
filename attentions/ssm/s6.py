"""S6, the selective state-space model alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.ssm._selective import SelectiveSSM


@dataclass(kw_only=True)
class S6State(State):
    """The state [B, M, N]."""

    memory: Tensor


class S6(Attention):
    """Mamba's selective state-space model without projections, convolution and gate: y = SSM(x), channel by channel.

    What MambaOut takes out of the Mamba block. It has no heads; step size, input and output directions come from x.

    Noncausal: forwards and backwards with the same weights, averaged. Cross: the state after the whole context, read by
    every query. Both are ours.

    Args:
        state_dim: N, numbers of state per channel.
        dt_min, dt_max: range of the initial step sizes, log-uniform.

    Source: Gu & Dao 2023, https://arxiv.org/abs/2312.00752, algorithm 2.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2312.00752"
    complexity = "T state_dim"

    def __init__(self, spec: LayerSpec, *, state_dim: int = 16, dt_min: float = 1e-3, dt_max: float = 1e-1):
        super().__init__(spec)
        rank = math.ceil(spec.dim / 16)
        self.ssm = SelectiveSSM(spec.dim, state_dim=state_dim, rank=rank, dt_min=dt_min, dt_max=dt_max)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source = self._source(x, context)
        if self.spec.cross:
            y = self.ssm.read(x, self.ssm.scan(source, key_mask)[1])
        else:
            y = self.ssm.scan(x, key_mask)[0] if self.spec.causal else self.ssm.both_ways(x, key_mask)
        return y.to(x.dtype)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> S6State:
        if not self.spec.cross:
            return S6State(memory=self.ssm.empty_memory(batch_size))
        if context is None:
            raise ValueError("cross-attention decodes over a context: init_state(batch_size, context)")
        return S6State(memory=self.ssm.scan(context, key_mask)[1])

    def state_bytes(self, length: int) -> int:
        return 4 * self.ssm.A_log.numel()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, S6State]:
        assert isinstance(state, S6State)
        if self.spec.cross:
            y, memory = self.ssm.read(x, state.memory), state.memory
        else:
            y, memory = self.ssm.advance(x, state.memory)
        return y.to(x.dtype), S6State(memory=memory, position=state.position + 1)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, S6State]:
        if self.spec.cross:
            state = self.init_state(len(x), context, key_mask=key_mask)
            return self.ssm.read(x, state.memory).to(x.dtype), S6State(memory=state.memory, position=x.shape[1])
        y, memory = self.ssm.scan(x)
        return y.to(x.dtype), S6State(memory=memory, position=x.shape[1])
