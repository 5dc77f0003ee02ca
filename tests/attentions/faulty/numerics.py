"""Faults of gradients and precision, and softmax attention that is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, repeat_heads
from attentions.dense.softmax import Softmax
from faulty.registry import caught


@caught("gradients", "parameter unused gets no gradient")
class UnusedParameter(Softmax):
    """Counts a parameter that does nothing."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.unused = nn.Parameter(torch.zeros(spec.dim))


@caught("precision", "output for inputs of size 100: not finite")
class UnstableSoftmax(Softmax):
    """exp without its maximum."""

    patterns = Pattern.NONCAUSAL_SELF

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, repeat_heads(k, q.shape[2])).exp()
        return torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), repeat_heads(v, q.shape[2]))


@caught("precision", "torch.bfloat16 is off")
class NarrowCounter(QKVAttention):
    """A running mean whose sum and count are kept in the dtype of the values: a bfloat16 count stands still at 256."""

    patterns = Pattern.CAUSAL_SELF
    paper = "ours"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        v = repeat_heads(v, q.shape[2])
        total, count, outputs = torch.zeros_like(v[:, 0]), v.new_zeros(()), []
        for t in range(v.shape[1]):
            total, count = total + v[:, t], count + 1
            outputs.append(total / count)
        return torch.stack(outputs, dim=1)


@caught("precision", "torch.float32 is off")
class HalfInside(Softmax):
    """Works in float16, whatever it is given."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k.half().to(k) if k.dtype == torch.float32 else k, v, **keywords)


@caught("full_budget", "output against softmax attention: differs")
class UnscaledLogits(Softmax):
    """Scores without 1 / sqrt(K)."""

    full_budget = staticmethod(lambda length: {"dropout": 0.0})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q * self.key_dim**0.5, k, v, **keywords)


@caught("full_budget", "gradient against softmax attention: differs")
class DetachedKeys(Softmax):
    """The right values with the wrong gradient."""

    full_budget = staticmethod(lambda length: {"dropout": 0.0})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k.detach(), v, **keywords)
