"""Softmax attention: the exact reference that every other row is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, QKVAttention, State


@dataclass(kw_only=True)
class KVCache(State):
    """All keys [B, S, G, K] and values [B, S, G, V] written so far; `mask` [B, S] where some are padding."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None


class Softmax(QKVAttention):
    """softmax(q k^T / sqrt(K)) v over all visible positions, through torch's SDPA; grouped heads share keys and values.

    A query that sees no key at all (every key masked) reads zero.

    Args:
        dropout: probability of dropping an attention weight in training.
        bias: bias on the projections.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1; grouped heads: Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/1706.03762"
    complexity = "T S"

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, bias=bias)
        self.dropout = dropout

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Which key each query may read: [T, S] bool, or None when plain causality (or nothing) decides."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        causal = self.spec.causal and not self.spec.cross
        visible = self.visible(q.shape[1], k.shape[1], q.device)
        if key_mask is not None:
            if visible is None and causal:
                visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
            allowed = key_mask[:, None, None, :]
            visible = allowed if visible is None else visible & allowed
        return self._sdpa(q, k, v, visible, causal and visible is None)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        output = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
        if visible is not None:  # SDPA's backends disagree on rows without a key (0 or NaN)
            empty = ~visible.any(-1)
            output = output.masked_fill(empty.reshape(-1, empty.shape[-1])[:, :, None, None], 0.0)
        return output

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        shape = batch_size, 0, self.spec.kv_heads
        return KVCache(k=like.new_empty(*shape, self.key_dim), v=like.new_empty(*shape, self.value_dim))

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        assert isinstance(state, KVCache)
        mask = state.mask
        if key_mask is not None or mask is not None:
            old = state.k.new_ones(state.k.shape[:2], dtype=torch.bool) if mask is None else mask
            new = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
            mask = torch.cat([old, new], dim=1)
        return KVCache(
            k=torch.cat([state.k, k], dim=1),
            v=torch.cat([state.v, v], dim=1),
            mask=mask,
            position=state.position + k.shape[1],
        )

    def state_bytes(self, length: int) -> int:
        return 4 * length * self.spec.kv_heads * (self.key_dim + self.value_dim)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        return self._sdpa(q, state.k, state.v, None if state.mask is None else state.mask[:, None, None, :], False)
