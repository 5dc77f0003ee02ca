"""S2-Attention: each head keeps its own shard of the context, all heads together the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, QKVAttention, State
from attentions.sparse._selection import Selection, chosen, masked_softmax, sparse_attention


@dataclass(kw_only=True)
class Shards(State):
    """For each key-value head the keys [B, n, K] and values [B, n, V] that some query may still read.

    mask: [B, n] for each, where some of a context are padding.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    mask: tuple[Tensor, ...] | None = None


class S2Attention(QKVAttention):
    """Softmax over the latest blocks and, in each head, over every v-th block behind them, at the head's own offset.

        block i reads block j <= i  where  i - j < num_local_blocks  or  j + g s = 0 mod v,  s = max(1, floor(v / G))

    g counts the key-value heads, whose query heads share a stripe. Stripes stand still while queries move on, so a
    block behind the local ones that is on no stripe is dropped for good: the state is local + T / v positions per head.
    With v <= G the heads together read every block; with more, G of v residues.

    Noncausal (ours): local to both sides, and stripes relative to the query, j - i + g s = 0 mod v. Cross (ours):
    stripes over the context's blocks alone; a head whose stripe lies behind a short context reads zero.

    Args:
        block_size: positions of a block.
        num_local_blocks: latest blocks that every head reads, own included; noncausal: to either side.
        stride: v; 1 is softmax attention.
        num_dense_heads: key-value heads, the last ones, that read everything.
        homo_head: all heads take the stripe of the first (ablation).
        dropout, bias: as in softmax attention.

    Source: Lin et al. 2024, https://arxiv.org/abs/2407.17678, as in the authors' code,
    https://github.com/linxihui/dkernel, with its names; the defaults are Phi-3-small's, every other layer of which is
    dense (here hybrid's business). The values of the paper's own models are not confirmed from its text.
    Differs: with grouped heads the code takes s from the number of query heads, which leaves more holes; the first
    stripe has no offset. The code's noncausal form counts blocks from the ends of the local ones, in all heads alike:
    |i - j| - num_local_blocks + 1 = 0 mod v.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2407.17678"
    complexity = "T (num_local_blocks block_size + S / stride)"
    full_budget = staticmethod(lambda length: {"block_size": 4, "stride": 1})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_size: int = 64,
        num_local_blocks: int = 16,
        stride: int = 8,
        num_dense_heads: int = 0,
        homo_head: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, bias=bias)
        for name, value in (("block_size", block_size), ("num_local_blocks", num_local_blocks), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= num_dense_heads <= spec.kv_heads:
            raise ValueError(f"num_dense_heads must be 0 to {spec.kv_heads} key-value heads, got {num_dense_heads}")
        if homo_head and num_dense_heads:
            raise ValueError(f"homo_head makes all heads alike, got num_dense_heads={num_dense_heads}; nearest: 0")
        self.block_size, self.num_local_blocks, self.stride = block_size, num_local_blocks, stride
        self.num_dense_heads, self.homo_head, self.dropout = num_dense_heads, homo_head, dropout

    def reads(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a block of queries reads a block of keys, by their numbers [N, 1] and [n]: [G, N, n] bool."""
        groups = torch.arange(self.spec.kv_heads, device=key.device)[:, None, None]
        step = max(1, self.stride // self.spec.kv_heads)
        offset = groups * (0 if self.homo_head else step)
        moving = not self.spec.causal and not self.spec.cross  # stripes go along with the query
        seen = ((key - query if moving else key) + offset) % self.stride == 0
        seen = seen | (groups >= self.spec.kv_heads - self.num_dense_heads)
        if self.spec.cross:
            return seen.expand(-1, len(query), -1)
        seen = seen | ((query - key).abs() < self.num_local_blocks)
        return seen & (key <= query) if self.spec.causal else seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        queries, keys = (math.ceil(x.shape[1] / self.block_size) for x in (q, k))
        mask = self.reads(torch.arange(queries)[:, None], torch.arange(keys))  # on the CPU, counted there
        blocks = chosen(mask[None]).to(q.device)
        causal = self.spec.pattern == Pattern.CAUSAL_SELF
        selection = Selection(blocks, self.block_size, self.block_size, causal=causal)
        dropout = self.dropout if self.training else 0.0
        return sparse_attention(q, k, v, selection, key_mask=key_mask, dropout=dropout)

    def held(self, length: int) -> list[Tensor]:
        """Positions that decoding keeps of the first `length`, ascending, for each key-value head, on the CPU."""
        position = torch.arange(length)
        latest = torch.tensor([[max(length - 1, 0) // self.block_size]])
        kept = self.reads(latest, torch.arange(length) // self.block_size)[:, 0]
        return [position[own] for own in kept]

    def init_memory(self, batch_size: int, like: Tensor) -> Shards:
        k, v = like.new_empty(batch_size, 0, self.key_dim), like.new_empty(batch_size, 0, self.value_dim)
        return Shards(k=(k,) * self.spec.kv_heads, v=(v,) * self.spec.kv_heads)

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Shards:
        assert isinstance(state, Shards)
        length = state.position + k.shape[1]
        new = torch.arange(state.position, length)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for group, (old, held) in enumerate(zip(self.held(state.position), self.held(length), strict=True)):
            at = torch.searchsorted(torch.cat([old, new]), held).to(k.device)
            mask = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
            before = mask.new_ones(len(mask), len(old)) if state.mask is None else state.mask[group]
            parts = ((state.k[group], k[:, :, group]), (state.v[group], v[:, :, group]), (before, mask))
            one, two, three = (torch.cat(pair, dim=1)[:, at] for pair in parts)  # copies: what is dropped is freed
            kept.append((one, two, three))
        keys, values, masks = zip(*kept, strict=True)
        masked = key_mask is not None or state.mask is not None
        return Shards(k=keys, v=values, mask=masks if masked else None, position=length)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, Shards)
        heads = []
        for group, queries in enumerate(q.unflatten(2, (self.spec.kv_heads, -1)).unbind(2)):  # [B, T, H / G, K]
            k, v = state.k[group], state.v[group]
            mask = k.new_ones(k.shape[:2], dtype=torch.bool) if state.mask is None else state.mask[group]
            scores = torch.einsum("bthk,bsk->bths", queries * self.key_dim**-0.5, k)
            weights = masked_softmax(scores, mask[:, None, None].expand(scores.shape))
            weights = F.dropout(weights, self.dropout, self.training).to(v.dtype)
            heads.append(torch.einsum("bths,bsv->bthv", weights, v))
        return torch.cat(heads, dim=2)

    def state_bytes(self, length: int) -> int:
        return 4 * sum(len(held) for held in self.held(length)) * (self.key_dim + self.value_dim)
