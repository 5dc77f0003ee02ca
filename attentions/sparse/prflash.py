"""PrFlashAttention, reconstructed: training drops blocks of the score matrix, distant ones more often."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern
from attentions.dense.softmax import Softmax


class PrFlashAttention(Softmax):
    """Softmax attention; training keeps each block of queries x keys with a probability that falls with its distance.

        p(delta) = (1 + delta)^-a,  delta = |query block - key block|;  the own block is always kept

    Blocks are drawn anew in every forward, for each head; rows of a batch share them. In evaluation and decoding p = 1:
    it is softmax attention. The blocks dropped are masked here, not skipped: the time saved is a kernel's to save.

    Args:
        block_size: positions in a block.
        decay: a; 0 keeps everything.
        importance: add log(1 / p) to the scores of kept blocks, so that numerator and denominator have the
            expectations of softmax attention, and training that of evaluation.
        dropout, bias: as in softmax attention.

    Source: Fulu Li 2024, PrFlashAttention. Reconstructed from a description at the level of the abstract: probabilistic
    dropping of blocks by distance under the causal mask. No code was found and nothing here is confirmed from the
    paper's text; p(delta), the block size, `importance`, evaluation with p = 1 and the noncausal form are ours.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "its probabilities need a distance: queries and context share no positions"}
    paper = "Fulu Li 2024, PrFlashAttention (reconstructed)"
    complexity = "T S, of which training needs the kept blocks: about T^(2 - decay) block_size^decay for decay < 1"
    full_budget = staticmethod(lambda length: {"decay": 0.0})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_size: int = 128,
        decay: float = 0.5,
        importance: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if decay < 0:
            raise ValueError(f"decay must be at least 0, got {decay}")
        self.block_size, self.decay, self.importance = block_size, decay, importance

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        if not self.training:
            return super().attend(q, k, v, key_mask=key_mask)
        length = q.shape[1]
        visible, bonus = self.draw(-(-length // self.block_size), q)
        visible, bonus = (self._tokens(x, length)[None] for x in (visible, bonus))
        if self.spec.causal:
            visible = visible.tril()
        if key_mask is not None:
            visible = visible & key_mask[:, None, None]
        # the lowest number, not -inf: a row without a key has NaN in its gradient
        scores = bonus.to(q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)
        heads = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=scores,
            dropout_p=self.dropout,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return heads.masked_fill(~visible.any(-1, keepdim=True), 0.0).transpose(1, 2)

    def draw(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """For count x count blocks: which of them each head keeps [H, N, N], and what is added to scores [1, N, N]."""
        block = torch.arange(count, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        log_p = -self.decay * (1 + (block[:, None] - block).abs()).log()
        keep = torch.rand(self.spec.num_heads, count, count, device=like.device) < log_p.exp()
        return keep, -log_p[None] if self.importance else torch.zeros_like(log_p)[None]

    def _tokens(self, x: Tensor, length: int) -> Tensor:
        """From blocks [H, N, N] to positions [H, T, T]."""
        for dim in (1, 2):
            x = x.repeat_interleave(self.block_size, dim=dim).narrow(dim, 0, length)
        return x
