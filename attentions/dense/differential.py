"""Differential attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax


class Differential(Softmax):
    """The difference of two softmax maps, so that what both attend to by accident cancels.

        head = (softmax(q1 k1^T / sqrt(d)) - lambda softmax(q2 k2^T / sqrt(d))) v
        output = W_o concat((1 - init) RMSNorm(head))
        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + init,  init = 0.8 - 0.6 exp(-0.3 layer)

    Each of the spec's H heads is one differential head: its q and k of width D are two halves of width d = D / 2, its
    v keeps width D. (The paper counts the same way: a transformer with heads of width d has twice as many.) So the
    layer has softmax attention's parameters and 3 D more for lambda and the norm: +1 % at M = 32, H = 2. The four
    lambda vectors are shared by a layer's heads; `layer` counts the differential layers from 0 (the paper's l - 1).
    Rotary positions turn each half on its own, so D must then be a multiple of 4. Grouped heads share both halves of k
    and v, the first map reading the first half. A query that sees no key reads zero in both maps.

    Args:
        dropout: probability of dropping an attention weight in training, in each map on its own.

    Source: Ye et al. 2024, https://arxiv.org/abs/2410.05258, eqs. 1 to 3; norm (with weight, eps 1e-5), lambda vectors
    of standard deviation 0.1 and grouped heads as in the authors' code with FlashAttention (in their form without it,
    both maps of a grouped head read the same half of k). Differs: noncausal and cross attention are ours.
    """

    paper = "https://arxiv.org/abs/2410.05258"

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0):
        multiple = 2 if spec.rotary_base is None or spec.cross else 4
        if spec.head_dim % multiple:
            below = spec.head_dim // multiple * multiple
            raise ValueError(
                f"differential attention halves q and k{', and rotary positions pair each half' * (multiple == 4)}: "
                f"dim / num_heads must be a multiple of {multiple}, got {spec.head_dim}; "
                f"nearest: {', '.join(str(width) for width in (below, below + multiple) if width)}"
            )
        super().__init__(spec, dropout=dropout)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * spec.layer)
        # [map, q or k, d]: plain parameters, which no backbone re-initialises
        self.lambda_vectors = nn.Parameter(0.1 * torch.randn(2, 2, self.key_dim // 2))
        self.norm_weight = nn.Parameter(torch.ones(self.value_dim))

    def second_weight(self) -> Tensor:
        """lambda, how much of the second map is taken away; at least float32: a small difference of numbers near 1."""
        vectors = self.lambda_vectors.to(torch.promote_types(self.lambda_vectors.dtype, torch.float32))
        first, second = vectors.prod(dim=1).sum(-1).exp()
        return first - second + self.lambda_init

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        halves = heads.unflatten(-1, (2, -1)).flatten(2, 3)
        return super()._rotate(halves, start).unflatten(2, (-1, 2)).flatten(-2)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        first = super()._sdpa(q1, k1, v, visible, is_causal)
        second = super()._sdpa(q2, k2, v, visible, is_causal)
        return first - self.second_weight().to(second.dtype) * second

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        normed = F.rms_norm(heads, (self.value_dim,), self.norm_weight.to(heads.dtype), eps=1e-5)
        return super().merge(x, (1 - self.lambda_init) * normed)
