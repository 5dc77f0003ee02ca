"""Gated short convolution: the control that mixes neighbours only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.ssm._convolution import DepthwiseConv


@dataclass(kw_only=True)
class ConvState(State):
    """The last kernel_size - 1 inputs [B, kernel_size - 1, M]."""

    tail: Tensor


class ShortConv(Attention):
    """conv(u) * (W u + b) + u: a depthwise convolution over a few neighbours, gated by the position itself.

    It has no heads and moves information at most kernel_size - 1 positions, so what it solves alone is local.
    Causal, or noncausal with a centred kernel. Positions of the backbone (rotary) do not enter.

    Args:
        kernel_size: positions seen, own included; odd when noncausal.

    Source: Arora et al. 2023 (Zoology), https://arxiv.org/abs/2312.04927, section 4 (BaseConv), with the kernel of 3
    and the inner residual "+ u" of the authors' code, which the paper's equation lacks.
    Differs: the depthwise kernel is a plain parameter and no channel mixing is added to it.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a kernel needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2312.04927"
    complexity = "T kernel_size"

    def __init__(self, spec: LayerSpec, *, kernel_size: int = 3):
        super().__init__(spec)
        self.conv = DepthwiseConv(spec.dim, kernel_size, causal=spec.causal, bias=True)
        self.gate_proj = nn.Linear(spec.dim, spec.dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        seen = x if key_mask is None else x.masked_fill(~key_mask[..., None], 0.0)
        return self.conv(seen) * self.gate_proj(x) + x

    def init_state(
        self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> ConvState:
        return ConvState(tail=self.conv.empty_tail(batch_size))

    def state_bytes(self, length: int) -> int:
        return 4 * self.conv.empty_tail(1).numel()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, ConvState]:
        assert isinstance(state, ConvState)
        output = self.conv(x, state.tail) * self.gate_proj(x) + x
        tail = self.conv.next_tail(x, state.tail)
        return output, dataclasses.replace(state, tail=tail, position=state.position + x.shape[1])

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, ConvState]:
        return self.step(x, self.init_state(x.shape[0]))  # a step takes any number of positions
