"""BaseConv: a gated short convolution with projections around it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._recurrence import masked
from attentions.ssm._convolution import DepthwiseConv
from attentions.ssm.short_conv import ConvState

ACTIVATIONS = ("silu", "none")


class BaseConv(Attention):
    """y = [(x W_1 + b_1) * f(conv(x W_2 + b_2))] W_o + b_o: a gate of the position itself on a few neighbours.

    The convolution is depthwise and acts on the second projection, both being expand / 2 * M wide. With expand = 4 that
    is 6 M^2 parameters and some, where softmax attention has 4 M^2. It moves information at most kernel_size - 1
    positions. Causal, or noncausal with a centred kernel; positions of the backbone (rotary) do not enter.

    Args:
        kernel_size: positions seen, own included; odd when noncausal.
        expand: width of both projections together over M.
        activation: f, silu (the released models) or none (the formula in the name of the layer).

    Source: Arora et al. 2024 (Based), https://arxiv.org/abs/2402.18668, as in the authors' code for their 360M model:
    expand 4, kernel 3, biases on the projections and none on the kernel. Differs: their fused CUDA path adds a bias to
    the kernel; the noncausal form is ours; that the paper's own formula lacks the SiLU is not confirmed from its text.
    Zoology's BaseConv, without projections before and after the convolution, is the row `short_conv`.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a kernel needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2402.18668"
    complexity = "T kernel_size"

    def __init__(self, spec: LayerSpec, *, kernel_size: int = 3, expand: int = 4, activation: str = "silu"):
        super().__init__(spec)
        if expand < 1 or expand * spec.dim % 2:
            near = max(1 + spec.dim % 2, expand + 1)
            raise ValueError(f"expand * dim must be even and at least 2, got expand={expand}; nearest: {near}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
        self.activation = activation
        inner = expand * spec.dim // 2
        self.gate_proj = nn.Linear(spec.dim, inner)  # W_1
        self.value_proj = nn.Linear(spec.dim, inner)  # W_2
        self.conv = DepthwiseConv(inner, kernel_size, causal=spec.causal)
        self.out_proj = nn.Linear(inner, spec.dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return self._merge(x, self.conv(masked(self.value_proj(x), key_mask)))

    def init_state(
        self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> ConvState:
        return ConvState(tail=self.conv.empty_tail(batch_size))

    def state_bytes(self, length: int) -> int:
        return 4 * self.conv.empty_tail(1).numel()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, ConvState]:
        assert isinstance(state, ConvState)
        value = self.value_proj(x)
        tail = self.conv.next_tail(value, state.tail)
        output = self._merge(x, self.conv(value, state.tail))
        return output, dataclasses.replace(state, tail=tail, position=state.position + x.shape[1])

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, ConvState]:
        return self.step(x, self.init_state(x.shape[0]))  # a step takes any number of positions

    def _merge(self, x: Tensor, local: Tensor) -> Tensor:
        return self.out_proj(self.gate_proj(x) * (F.silu(local) if self.activation == "silu" else local))
