"""Combiner with fixed segments: the own segment position by position, every other one as a region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State
from attentions.linear._recurrence import wide
from attentions.lowrank._blocks import segments
from attentions.lowrank._coarse import Pooling, cut, known, summarise


@dataclass(kw_only=True)
class FixedState(State):
    """Summaries of finished segments and the segment of the latest position.

    Args:
        regions: keys [B, N, G, K] and values [B, N, H, V]; those in `seen` [B, N] count (None: all).
        segment: keys and values [B, n, G, D] of the 1 to s latest positions; of none before the first.
        top: highest query of these positions in each channel [B, 1 or 0, H, K].
    """

    regions: tuple[Tensor, ...]
    segment: tuple[Tensor, ...]
    top: Tensor
    seen: Tensor | None = None


class CombinerFixed(Pooling):
    """Full attention at the price of a few keys: the own segment directly, every other segment r as one region.

    A query weighs the keys of its segment and the keys max_j k_j of the regions in one softmax. What goes to a region
    is shared out inside it by weights that no query changes, softmax over j in r of (max_j q_j . k_j / sqrt(K)), so
    that each position has a share. Causal: the own segment up to the query and the regions before it; s = 1 and
    s >= T are softmax attention. Noncausal: all other regions. Cross: every segment of the context is a region, pooled
    by the query projection of the context, and nothing is read directly; s = 1 is softmax attention.

    Decoding keeps a key and a value for each finished segment and the segment that is being written.

    Args:
        segment_size: positions s in a segment, about sqrt(T).
        dropout: of the joint weights, in training.
        bias: bias on the four projections.

    Source: Ren et al. 2021, https://arxiv.org/abs/2107.05768, Combiner-Fixed, after the authors' code (section and
    equation numbers not confirmed from the paper's text). Their language models: s = 128 of 2048 positions.
    Differs: of their poolings only the maximum. Their noncausal form reads the own segment a second time, as a region;
    here it does not. Their dropout acts on the weights of the own segment and inside regions. The cross form is ours.
    Where the backbone asks for rotary positions, turned queries and keys are pooled. Of a masked segment only the
    unmasked positions count.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2107.05768"
    complexity = "T (segment_size + S / segment_size)"
    full_budget = staticmethod(lambda length: {"segment_size": 1})

    def __init__(self, spec: LayerSpec, *, segment_size: int = 128, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, dropout=dropout, bias=bias)
        if segment_size < 1:
            raise ValueError(f"segment_size must be at least 1, got {segment_size}")
        self.segment_size = segment_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        length, size = q.shape[1], min(self.segment_size, k.shape[1])
        with torch.autocast(q.device.type, enabled=False):
            scaled = self._heads(q * self.key_dim**-0.5)
            own, near_k, near_v = (segments(self._heads(x), size) for x in (terms.get("own", q), k, v))
            seen = cut(known(k, key_mask), size)  # [B, 1, N, s]
            far_k, far_v, far_seen = summarise(own, near_k, near_v, seen)
            if self.spec.cross:
                heads = self._weights(scaled @ far_k.mT, far_seen[:, :, None]) @ far_v
                return heads.transpose(1, 2).to(q.dtype)

            scaled = segments(scaled, size)
            count = scaled.shape[2]
            near_seen = seen[..., None, :].expand(-1, -1, -1, size, -1)
            region = torch.arange(count, device=q.device)
            other = region != region[:, None]
            if self.spec.causal:
                near_seen, other = near_seen & near_seen.new_ones(size, size).tril(), other.tril()
            far_seen = (far_seen[:, :, None] & other)[..., None, :].expand(-1, -1, -1, size, -1)
            scores = torch.cat([scaled @ near_k.mT, scaled @ far_k[:, :, None].mT], dim=-1)
            near, far = self._weights(scores, torch.cat([near_seen, far_seen], dim=-1)).split([size, count], dim=-1)
            heads = (near @ near_v + far @ far_v[:, :, None]).flatten(2, 3)[:, :, :length]
            return heads.transpose(1, 2).to(q.dtype)

    def init_memory(self, batch_size: int, like: Tensor) -> FixedState:
        def empty(heads: int, width: int) -> Tensor:
            return wide(like.new_empty(batch_size, 0, heads, width))

        heads, groups = self.spec.num_heads, self.spec.kv_heads
        return FixedState(
            regions=(empty(groups, self.key_dim), empty(heads, self.value_dim)),
            segment=(empty(groups, self.key_dim), empty(groups, self.value_dim)),
            top=empty(heads, self.key_dim),
        )

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> FixedState:
        assert isinstance(state, FixedState)
        with torch.autocast(k.device.type, enabled=False):
            k, v = (torch.cat([old, wide(x)], dim=1) for old, x in zip(state.segment, (k, v), strict=True))
            # the highest query of a segment may stand for each of its earlier ones
            earlier = state.top.expand(-1, state.segment[0].shape[1], -1, -1)
            own = torch.cat([earlier, wide(terms["own"])], dim=1)
            size = min(self.segment_size, k.shape[1])
            # a segment that ends with the latest position is still read directly
            done = k.shape[1] if self.spec.cross else (k.shape[1] - 1) // self.segment_size * self.segment_size
            own_done, k_done, v_done = (segments(self._heads(x[:, :done]), size) for x in (own, k, v))
            key, value, seen = summarise(own_done, k_done, v_done, cut(known(k, key_mask)[..., :done], size))
            key = key[:, :: self.spec.num_heads // self.spec.kv_heads]  # heads of a group have the same
            new = (x.transpose(1, 2) for x in (key, value))
            return FixedState(  # cloned: a view would keep dropped positions alive
                regions=tuple(torch.cat(pair, dim=1) for pair in zip(state.regions, new, strict=True)),
                segment=(k[:, done:].clone(), v[:, done:].clone()),
                top=state.top if self.spec.cross else own[:, done:].amax(1, keepdim=True),
                seen=None if key_mask is None else seen[:, 0],
                position=state.position + terms["own"].shape[1],
            )

    def state_bytes(self, length: int) -> int:
        heads, groups = self.spec.num_heads, self.spec.kv_heads
        region, pair = groups * self.key_dim + heads * self.value_dim, groups * (self.key_dim + self.value_dim)
        if self.spec.cross:
            return 4 * -(-length // self.segment_size) * region
        done = max(0, length - 1) // self.segment_size
        top = heads * self.key_dim if length else 0
        return 4 * (done * region + (length - done * self.segment_size) * pair + top)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, FixedState)
        with torch.autocast(q.device.type, enabled=False):
            pairs = zip(state.regions, state.segment, strict=True)
            k, v = (torch.cat([self._heads(x) for x in pair], dim=2) for pair in pairs)
            seen = k.new_ones(1, 1, dtype=torch.bool) if state.seen is None else state.seen[:, None, None]
            return (self._weights(self._heads(q * self.key_dim**-0.5) @ k.mT, seen) @ v).transpose(1, 2).to(q.dtype)
