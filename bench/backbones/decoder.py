"""A pre-norm decoder: causal self-attention in every layer, logits at labelled positions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from attentions.base import Pattern
from bench.backbones.base import DecodeState
from bench.backbones.stack import Stack


class Decoder(Stack):
    """A stack whose every layer reads the past only; it decodes token by token.

    Source: Arora et al. 2023 (Zoology), https://arxiv.org/abs/2312.04927, for the MQAR setting; pre-norm: Xiong et
    al. 2020, https://arxiv.org/abs/2002.04745.
    """

    pattern = Pattern.CAUSAL_SELF
    slots: ClassVar[dict[str, Pattern]] = {"decoder_self": Pattern.CAUSAL_SELF}

    def init_state(self, batch_size: int, context: Tensor | None = None) -> DecodeState:
        return DecodeState(layers=tuple(layer.init_state(batch_size) for layer in self._stack()))

    def step(self, inputs: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        x = self.embedding(inputs, state.position)
        states = []
        for layer, memory in zip(self._stack(), state.layers, strict=True):
            x, memory = layer.step(x, memory)
            states.append(memory)
        return self.head(x), DecodeState(layers=tuple(states), position=state.position + 1)
