"""Layers that are whole only on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State
from attentions.dense.softmax import KVCache, Softmax
from faulty.registry import caught


@caught("device", "cpu")
class NumbersOnTheCPU(Softmax):
    """Counts the keys with numbers that are made without a device."""

    patterns = Pattern.NONCAUSAL_SELF

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k * torch.arange(1.0, 1 + k.shape[1])[:, None, None].to(k.dtype), v, **keywords)


@caught("device", "cpu")
class TableOnTheCPU(Softmax):
    """Keeps a table that is no buffer, so that it does not move with the layer."""

    patterns = Pattern.NONCAUSAL_SELF

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.table = torch.linspace(0.5, 1.5, spec.head_dim, dtype=torch.float64)

    def query(self, x: Tensor, *arguments: Any) -> Tensor:
        return super().query(x, *arguments) * self.table.to(x.dtype)


@caught("device", "gives an output on cpu")
class ResultOnTheCPU(Softmax):
    """Writes its output into a tensor that is made without a device."""

    patterns = Pattern.NONCAUSAL_SELF

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return torch.zeros(x.shape, dtype=x.dtype)


@dataclass
class Counted(KVCache):
    count: Tensor | None = None


@caught("device", "leaves state.count on cpu")
class CountOnTheCPU(Softmax):
    """Decoding keeps a count beside the keys, on the CPU."""

    patterns = Pattern.CAUSAL_SELF

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        output, state = super().step(x, state)
        return output, Counted(**vars(state), count=torch.zeros(1))
