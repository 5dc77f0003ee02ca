"""MoBA: each query chooses blocks of keys by their mean."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.dense.softmax import KVCache, Softmax
from attentions.sparse._compression import in_blocks
from attentions.sparse._selection import Selection, largest, sparse_attention


@dataclass(kw_only=True)
class BlockCache(KVCache):
    """All keys and values, and the mean key of each block [B, N, G, K], of the last one as far as it is written."""

    means: Tensor


class MoBA(Softmax):
    """Softmax over the keys of `top_k` blocks, chosen by each query and head: those with the largest gate q . mean(K).

    Causal, the own block always counts among the top_k and is read up to the query; the others come from the complete
    blocks before it. Noncausal, the own block always counts too and every block is a candidate. In cross-attention
    there is no own block: the gates decide alone. No gradient reaches the gate: it learns through the same q and k.

    Args:
        block_size: keys in a block.
        top_k: blocks read by a query, own included.
        dropout, bias: as in softmax attention.

    Source: Lu et al. 2025, https://arxiv.org/abs/2502.13189, section 2.2, eq. 2-6; the paper's scaling runs have
    block_size = 512 and top_k = 3.
    Differs: the noncausal and cross forms are ours. Of a masked block the mean is that of its unmasked keys, and a
    block without one is no candidate. Equal gates choose the earlier block.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2502.13189"
    complexity = "T (S / block_size + top_k block_size)"
    selects = True
    full_budget = staticmethod(lambda length: {"block_size": 4, "top_k": length})

    def __init__(
        self, spec: LayerSpec, *, block_size: int = 512, top_k: int = 3, dropout: float = 0.0, bias: bool = False
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        for name, value in (("block_size", block_size), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.block_size = block_size
        self.top_k = top_k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        selection = self.select(q, self.means(k, key_mask), key_mask)
        dropout = self.dropout if self.training else 0.0
        return sparse_attention(q, k, v, selection, key_mask=key_mask, dropout=dropout)

    def select(self, q: Tensor, means: Tensor, key_mask: Tensor | None, start: int = 0) -> Selection:
        """The blocks of each query [B, H, T, top_k], by its gates on the block means [B, N, G, K]."""
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            means = repeat_heads(means, self.spec.num_heads)
            gates = q.to(means.dtype).transpose(1, 2) @ means.permute(0, 2, 3, 1)  # [B, H, T, N]
            block = torch.arange(means.shape[1], device=q.device)
            if not self.spec.cross:
                own = (start + torch.arange(q.shape[1], device=q.device))[:, None] // self.block_size
                gates = gates.masked_fill(block == own, math.inf)
                if self.spec.causal:
                    gates = gates.masked_fill(block > own, -math.inf)
            if key_mask is not None:
                gates = gates.masked_fill(~in_blocks(key_mask, self.block_size).any(-1)[:, None, None], -math.inf)
        causal = self.spec.pattern == Pattern.CAUSAL_SELF
        return Selection(largest(gates, self.top_k), self.block_size, causal=causal, start=start)

    def means(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Mean of the unmasked keys of each block: [B, S, G, K] -> [B, N, G, K], at least float32."""
        wide = torch.promote_types(k.dtype, torch.float32)
        mask = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        with torch.no_grad():
            total = in_blocks(k.masked_fill(~mask[..., None, None], 0.0), self.block_size).sum(2, dtype=wide)
            return total / in_blocks(mask, self.block_size).sum(2).clamp_min(1)[..., None, None]

    def init_memory(self, batch_size: int, like: Tensor) -> BlockCache:
        cache = super().init_memory(batch_size, like)
        return BlockCache(k=cache.k, v=cache.v, means=self.means(cache.k, None))

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> BlockCache:
        assert isinstance(state, BlockCache)
        cache = super().update(state, k, v, key_mask=key_mask)
        complete = state.k.shape[1] // self.block_size
        fresh = complete * self.block_size
        means = self.means(cache.k[:, fresh:], None if cache.mask is None else cache.mask[:, fresh:])
        means = torch.cat([state.means[:, :complete], means], dim=1)
        return BlockCache(means=means, **{f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)})

    def state_bytes(self, length: int) -> int:
        means = math.ceil(length / self.block_size)
        return super().state_bytes(length) + 4 * means * self.spec.kv_heads * self.key_dim

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, BlockCache)
        selection = self.select(q, state.means, state.mask, start=state.position - q.shape[1])
        return sparse_attention(q, state.k, state.v, selection, key_mask=state.mask)
