"""RoPE x ALiBi, reconstructed: rotary positions and a penalty on distance with harmonic slopes."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State, rotary
from attentions.dense.softmax import KVCache, Softmax


class RopeAlibi(Softmax):
    """softmax((R_i q) . (R_j k) / sqrt(K) - m_h |i - j|) v with slopes m_h = slope / h for the heads h = 1 ... H.

    Every head prefers what is near, the first one most; ALiBi's slopes are geometric, 2^(-8 h / H). With two heads the
    slopes 1 and 1/2 leave a key 20 positions away a factor of e^-20 and e^-10: this is local attention.

    Args:
        rotary_base: base of the rotation where the slot asks for none (its own wins); None: no rotation.
        slope: of the first head; 0: no penalty.
        dropout, bias: as in softmax attention.

    Source: Fulu Li 2024, "RoPE x ALiBi" beside PrFlashAttention. Reconstructed from a description at the level of the
    abstract: rotary and linear biases combined, with slopes of the harmonic series. No code was found and nothing here
    is confirmed from the paper's text. The noncausal form, by |i - j|, is ours. ALiBi: Press et al. 2021,
    https://arxiv.org/abs/2108.12409; RoPE: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "both terms need a distance, and queries and context share no positions"}
    paper = "Fulu Li 2024, RoPE x ALiBi (reconstructed)"
    full_budget = staticmethod(lambda length: {"slope": 0.0, "rotary_base": None})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rotary_base: float | None = 10000.0,
        slope: float = 1.0,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        self.rotary_base = rotary_base if spec.rotary_base is None else spec.rotary_base
        if self.rotary_base is not None and self.key_dim % 2:
            raise ValueError(
                f"rotary positions need an even key width per head, got {self.key_dim}; "
                f"nearest: {max(2, self.key_dim - 1)}, {self.key_dim + 1}"
            )
        if slope < 0:
            raise ValueError(f"slope must be at least 0, got {slope}")
        self.slope = slope

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return self._read(q, k, v, key_mask, 0)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        return self._read(q, state.k, state.v, state.mask, state.position - q.shape[1])

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        return heads if self.rotary_base is None else rotary(heads, base=self.rotary_base, start=start)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, start: int) -> Tensor:
        behind = (start + torch.arange(q.shape[1], device=q.device))[:, None] - torch.arange(
            k.shape[1], device=q.device
        )
        wide = torch.promote_types(q.dtype, torch.float32)
        slopes = self.slope / torch.arange(1, self.spec.num_heads + 1, device=q.device, dtype=wide)
        visible = (
            (behind >= 0)[None, None] if self.spec.causal else torch.ones_like(behind, dtype=torch.bool)[None, None]
        )
        if key_mask is not None:
            visible = visible & key_mask[:, None, None]
        bias = (-slopes[:, None, None] * behind.abs())[None].to(q.dtype)
        heads = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            # the lowest number, not -inf: a row without a key has NaN in its gradient
            attn_mask=bias.masked_fill(~visible, torch.finfo(q.dtype).min),
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return heads.masked_fill(~visible.any(-1, keepdim=True), 0.0).transpose(1, 2)
