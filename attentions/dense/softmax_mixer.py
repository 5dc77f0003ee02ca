"""Softmax attention in the token-mixing template."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attentions.base import Pattern, repeat_heads
from attentions.dense._template import TokenMixer
from attentions.dense.softmax import Softmax


class SoftmaxMixer(Softmax, TokenMixer):
    """Softmax attention that shows its matrix: softmax(q k^T / sqrt(K)), zero where a key is not visible.

    The reference of the template and, through `mixed`, attention with all its weights in memory, as it was before fused
    kernels. No row: its outputs are softmax attention's.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1.
    """

    def matrix(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        q, k = self.query(x), repeat_heads(self.key_value(self._source(x, context))[0], self.spec.num_heads)
        scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(self.key_dim)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if self.spec.pattern == Pattern.CAUSAL_SELF:
            visible = visible.tril()
        if key_mask is not None:
            visible = visible & key_mask[:, None, None]
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        return weights.masked_fill(~visible, 0.0)  # also in a row without a key

    def values(self, source: Tensor) -> Tensor:
        return repeat_heads(self.key_value(source)[1], self.spec.num_heads)
