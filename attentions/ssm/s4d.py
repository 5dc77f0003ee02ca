"""The diagonal state-space layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._recurrence import masked
from attentions.ssm._diagonal import DiagonalSSM


@dataclass(kw_only=True)
class DiagonalState(State):
    """The state of every channel's filter [B, M, N/2], complex: M N real numbers."""

    memory: Tensor


class S4D(Attention):
    """Every channel is filtered by its own linear time-invariant system with a diagonal state matrix (S4D).

    y = K * u + D u with K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l), then GELU and GLU(W y + b), which
    alone mixes channels. The kernel does not depend on the input, so nothing is selected. All positions at once by
    FFT, or one at a time with a state of M N numbers. A masked position is a zero input. It has no heads.

    At state_dim 64 the filters hold 130 M parameters and the GLU 2 M^2 + 2 M: 1.5 times softmax attention's 4 M^2 at
    width 32, 1.0 at width 64, 0.8 at width 128.

    Args:
        state_dim: N, numbers of state per channel, even.
        init: lin, inv or legs, the start of A; see `DiagonalSSM`.
        dt_min, dt_max: range of the initial step sizes, log-uniform.

    Source: Gu et al. 2022, https://arxiv.org/abs/2206.11893, eq. 2, sections 3 and 4; GELU, GLU, S4D-Lin as default and
    initialisations as in the authors' minimal S4D, the backward kernel as in their S4 layer. Differs: one learning rate
    and weight decay for all parameters, where the authors give A and dt their own and no decay; A and C of every
    channel's own and no B, where their S4 layer also trains B and its configurations tie A and B among channels.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {
        Pattern.CROSS: "a kernel needs a distance, and queries and context share no positions; no query enters a read"
    }
    paper = "https://arxiv.org/abs/2206.11893"
    complexity = "T log T + T state_dim"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        state_dim: int = 64,
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ):
        super().__init__(spec)
        self.ssm = DiagonalSSM(
            spec.dim, state_dim=state_dim, init=init, dt_min=dt_min, dt_max=dt_max, causal=spec.causal
        )
        self.out_proj = nn.Linear(spec.dim, 2 * spec.dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return self._mix_channels(x, self.ssm(masked(x, key_mask)))

    def init_state(
        self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> DiagonalState:
        return DiagonalState(memory=self.ssm.empty_state(batch_size))

    def state_bytes(self, length: int) -> int:
        return 8 * self.ssm.empty_state(1).numel()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, DiagonalState]:
        assert isinstance(state, DiagonalState)
        memory = self.ssm.advance(state.memory, x)
        y = self.ssm.read(memory)[:, None] + self.ssm.skip(x)
        return self._mix_channels(x, y), dataclasses.replace(state, memory=memory, position=state.position + 1)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, DiagonalState]:
        memory = self.ssm.advance(self.ssm.empty_state(x.shape[0]), x)
        return self(x), DiagonalState(memory=memory, position=x.shape[1])

    def _mix_channels(self, x: Tensor, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y).to(x.dtype)), dim=-1)
