"""BigBird: a band, a few blocks that see and are seen by all, and random blocks."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State
from attentions.dense.softmax import KVCache, Softmax
from attentions.sparse._selection import Selection, sparse_attention


class BigBird(Softmax):
    """Softmax over a band of blocks, global blocks at the ends and random blocks elsewhere: a sparse graph, well mixed.

    Noncausal, query block i reads the blocks i - w/2 ... i + w/2, the first and last g blocks and r random ones of the
    rest; the queries of the first and last g blocks read everything. Causal, it reads i - w + 1 ... i, the first g
    blocks and r random ones of the past. A sequence of at most that many blocks gets softmax attention.

    The graph is drawn once, at construction, for each key-value head: row i holds an order of all blocks up to
    max_length, and of this order come the first r that the length (causal: the past) leaves open. It is saved in the
    state dict and never drawn again. Decoding keeps every key: a random block may be any.

    Args:
        block_size: positions in a block.
        num_window_blocks: blocks w of the band, own included; odd when noncausal.
        num_global_blocks: blocks g, at either end when noncausal.
        num_random_blocks: blocks r.
        dropout, bias: as in softmax attention.

    Source: Zaheer et al. 2020, https://arxiv.org/abs/2007.14062, section 2 and appendix D (ITC, the internal form).
    Differs: the causal form is ours (the authors' decoder reads everything). Random blocks come from the whole
    sequence; the authors' code takes them from its front, the first 1024 positions (for lengths of 1024, 2048, 3072 and
    4096) or 2 r + 5 blocks (for others of more blocks). That code has w = 3 and g = 1 only, where the band meets no
    end; others are cut off there.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a band needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2007.14062"
    complexity = "T block_size"
    full_budget = staticmethod(lambda length: {"block_size": 4, "num_random_blocks": length})

    order: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_size: int = 64,
        num_window_blocks: int = 3,
        num_global_blocks: int = 1,
        num_random_blocks: int = 3,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        for name, value, least in (
            ("block_size", block_size, 1),
            ("num_window_blocks", num_window_blocks, 1),
            ("num_global_blocks", num_global_blocks, 0),
            ("num_random_blocks", num_random_blocks, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not spec.causal and num_window_blocks % 2 == 0:
            raise ValueError(
                f"num_window_blocks must be odd when noncausal, got {num_window_blocks}; "
                f"nearest: {num_window_blocks - 1}, {num_window_blocks + 1}"
            )
        self.block_size = block_size
        self.num_window_blocks = num_window_blocks
        self.num_global_blocks = num_global_blocks
        self.num_random_blocks = num_random_blocks
        most = math.ceil(spec.max_length / block_size)
        # whole numbers: a bf16 module would round random reals to ties
        self.register_buffer("order", torch.rand(spec.kv_heads, most, most).argsort(-1).int())

    def blocks(self, num_blocks: int, first: int = 0, last: int | None = None) -> Tensor:
        """What the query blocks first ... last - 1 of num_blocks read: [1, G, N, w + (1 or 2) g + r], -1 for none."""
        if num_blocks > self.order.shape[1]:
            raise ValueError(
                f"the random blocks are drawn for max_length={self.spec.max_length}, "
                f"got at least {(num_blocks - 1) * self.block_size + 1} positions"
            )
        causal, ends = self.spec.causal, self.num_global_blocks
        index = torch.arange(num_blocks, device=self.order.device)
        row = index[first:last, None]
        low = row - (self.num_window_blocks - 1 if causal else self.num_window_blocks // 2)
        band = low + index.new_tensor(range(self.num_window_blocks))
        high = band[:, -1:]
        edges = index[:ends] if causal else torch.cat([index[:ends], index[num_blocks - ends :]])
        edges = edges.expand(len(row), -1)
        # what is read anyway or must not be: no block may be listed twice
        taken = ((index >= low) & (index <= high)) | (index < ends)
        taken = taken | (index > row if causal else index >= num_blocks - ends)
        order = self.order[:, first:num_blocks, :num_blocks][:, : len(row)].masked_fill(taken, -1)
        drawn = order.topk(min(self.num_random_blocks, num_blocks))
        fixed = torch.cat(
            [
                band.masked_fill((band < 0) | (band >= num_blocks), -1),
                edges.masked_fill((edges >= low) & (edges <= high) | (causal & (edges > row)), -1),
            ],
            dim=-1,
        )
        random = drawn.indices.masked_fill(drawn.values < 0, -1)
        return torch.cat([fixed.expand(len(random), -1, -1), random], dim=-1)[None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        size, num_blocks, ends = self.block_size, math.ceil(q.shape[1] / self.block_size), self.num_global_blocks
        read = functools.partial(sparse_attention, key_mask=key_mask, dropout=self.dropout if self.training else 0.0)
        if self.spec.causal or not ends:
            return read(q, k, v, Selection(self.blocks(num_blocks), size, size, causal=self.spec.causal))
        everything = Selection(torch.arange(num_blocks, device=q.device)[None, None, None], size, q.shape[1])
        if num_blocks <= 2 * ends:
            return read(q, k, v, everything)
        first, last = ends * size, (num_blocks - ends) * size
        inner = read(q[:, first:last], k, v, Selection(self.blocks(num_blocks, ends, num_blocks - ends), size, size))
        outer = read(torch.cat([q[:, :first], q[:, last:]], dim=1), k, v, everything)
        return torch.cat([outer[:, :first], inner, outer[:, first:]], dim=1)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        row = (state.position - 1) // self.block_size
        return sparse_attention(q, state.k, state.v, Selection(self.blocks(row + 1, row), self.block_size))
