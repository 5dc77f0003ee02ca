"""Combiner over dyadic blocks: a region for each binary digit of the position."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State
from attentions.dense.softmax import KVCache
from attentions.linear._recurrence import wide
from attentions.lowrank._blocks import segments
from attentions.lowrank._coarse import Pooling, cut, known, shared_out, summarise


@dataclass(kw_only=True)
class LogNState(KVCache):
    """All keys and values, and the highest query of each region of the latest position, its own included: `tops`
    [B, regions, H, K].
    """

    tops: Tensor


class CombinerLogN(Pooling):
    """Full attention through about log2(T) regions: the sibling of each dyadic block that holds the position.

    At level l = 0, 1, ... the positions fall into blocks of 2^l. Position i lies in block i >> l, and when that number
    is odd, its past holds the whole block before, [((i >> l) - 1) << l, (i >> l) << l): a region. These are disjoint
    and cover 0 ... i - 1 (Fenwick's decomposition); i itself is read directly. Noncausal, the sibling is a region on
    whichever side it lies. Weights and summaries of regions are those of CombinerFixed.

    Decoding keeps all keys and values, since a block that doubles shares itself out anew, and a query per region.

    Args:
        dropout: of the joint weights, in training.
        bias: bias on the four projections.

    Source: Ren et al. 2021, https://arxiv.org/abs/2107.05768, Combiner-Logsparse, after the authors' code (section
    and equation numbers not confirmed from the paper's text).
    Differs: their dropout acts inside regions. The noncausal form is ours. Where the backbone asks for rotary
    positions, turned queries and keys are pooled. Of a masked block only the unmasked positions count.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {
        Pattern.CROSS: "a block's sibling is near a position, which context and queries do not share"
    }
    paper = "https://arxiv.org/abs/2107.05768"
    complexity = "T log(T)"

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, dropout=dropout, bias=bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        length = q.shape[1]
        levels = (length - 1).bit_length()
        with torch.autocast(q.device.type, enabled=False):
            q_heads, k_heads, v_heads = (segments(self._heads(x), 2**levels).squeeze(2) for x in (q, k, v))
            seen = cut(known(k, key_mask), 2**levels).squeeze(2)
            lowest = torch.finfo(k_heads.dtype).min
            tops = [x.masked_fill(~seen[..., None], lowest) for x in (q_heads, k_heads)]  # maxima of blocks, by level
            scores, values, visible = [(q_heads * k_heads).sum(-1)], [], [seen]
            for level in range(levels):
                size = 2**level
                # blocks in pairs [B, H, pairs, 2, size, D]: each, or only the first, is the other's region
                regions = slice(None, 1) if self.spec.causal else slice(None)
                pairs = [x.unflatten(2, (-1, 2, size)) for x in (q_heads, k_heads, v_heads, seen)]
                inside = pairs[3][:, :, :, regions]
                any_seen = inside.any(-1, keepdim=True)
                top, key = (x.unflatten(2, (-1, 2))[:, :, :, regions].masked_fill(~any_seen, 0.0) for x in tops)
                values.append(shared_out(top, pairs[1][:, :, :, regions], pairs[2][:, :, :, regions], inside))
                readers = pairs[0][:, :, :, 1:] if self.spec.causal else pairs[0].flip(3)
                scores.append(self._spread((readers @ key[..., None]).squeeze(-1)))
                visible.append(self._spread(any_seen.expand(-1, -1, -1, -1, size)))
                tops = [torch.maximum(x[:, :, 0::2], x[:, :, 1::2]) for x in tops]
            scaled = torch.stack(scores, dim=-1) * self.key_dim**-0.5
            own, *weights = self._weights(scaled, torch.stack(visible, dim=-1)).unbind(-1)
            heads = own[..., None] * v_heads
            for level, (weight, value) in enumerate(zip(weights, values, strict=True)):
                shares = weight.unflatten(2, (-1, 2, 2**level))
                shares = shares[:, :, :, 1:] if self.spec.causal else shares.flip(3)
                heads = heads + self._spread(shares[..., None] * value[..., None, :])
            return heads[:, :, :length].transpose(1, 2).to(q.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        """From readers [B, H, pairs, 1 or 2, size, ...], in the order of their regions, to positions [B, H, T, ...]."""
        x = torch.cat([torch.zeros_like(x), x], dim=3) if self.spec.causal else x.flip(3)
        return x.flatten(2, 4)

    def init_memory(self, batch_size: int, like: Tensor) -> LogNState:
        heads, groups = self.spec.num_heads, self.spec.kv_heads
        k, v, tops = (
            wide(like.new_empty(batch_size, 0, *shape))
            for shape in ((groups, self.key_dim), (groups, self.value_dim), (heads, self.key_dim))
        )
        return LogNState(k=k, v=v, tops=tops)

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> LogNState:
        assert isinstance(state, LogNState)
        tops = torch.cat([state.tops, wide(terms["own"])], dim=1)
        position = state.position + k.shape[1]
        starts = [*_regions(state.position)[:-1], *range(state.position, position)]
        bounds = [starts.index(start) for start in _regions(position)[:-1]] + [len(starts)]
        return LogNState(
            k=torch.cat([state.k, wide(k)], dim=1),
            v=torch.cat([state.v, wide(v)], dim=1),
            tops=torch.stack([tops[:, i:j].amax(1) for i, j in pairwise(bounds)], dim=1),
            position=position,
        )

    def state_bytes(self, length: int) -> int:
        pair = self.spec.kv_heads * (self.key_dim + self.value_dim)
        return 4 * (length * pair + (len(_regions(length)) - 1) * self.spec.num_heads * self.key_dim)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, LogNState)
        with torch.autocast(q.device.type, enabled=False):
            k, v, tops = (self._heads(x) for x in (state.k, state.v, state.tops))
            bounds = _regions(state.position)
            parts = [
                summarise(tops[:, :, n, None], k[:, :, i:j], v[:, :, i:j], known(state.k[:, i:j], None))
                for n, (i, j) in enumerate(pairwise(bounds))
            ]
            key, value = (torch.stack([part[n] for part in parts], dim=2) for n in (0, 1))
            scores = self._heads(q) @ key.mT * self.key_dim**-0.5
            return (scores.softmax(-1) @ value).transpose(1, 2).to(q.dtype)


def _regions(length: int) -> list[int]:
    """Where the regions of the last of `length` positions start, its own included, and `length`: 7 gives 0, 4, 6, 7."""
    before = max(0, length - 1)
    sizes = [1 << level for level in reversed(range(before.bit_length())) if before >> level & 1]
    return [sum(sizes[:n]) for n in range(len(sizes) + 1)] + [length] * (length > 0)
