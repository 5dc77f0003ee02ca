"""Tensor attention: softmax over all pairs of positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.dense._tensor import ThirdOrder
from attentions.linear._recurrence import wide

SCORES = 2**14  # most scores of one head at a time; changes memory and speed only


@dataclass(kw_only=True)
class PairCache(State):
    """Both keys [B, S, G, K] and both values [B, S, G, V] written so far; `mask` [B, S] where some are padding."""

    k1: Tensor
    k2: Tensor
    v1: Tensor
    v2: Tensor
    mask: Tensor | None = None


class TensorAttention(ThirdOrder):
    """o_i = sum_jk softmax_jk(s_ijk) (v1_j * v2_k) with s_ijk = (1/K) sum_c q_ic k1_jc k2_kc, over all visible pairs.

    That is softmax attention at scale 1/K over the pairs' Kronecker keys k1_j * k2_k and values v1_j * v2_k; with k2
    and v2 all ones it is ordinary attention. Causal: j, k <= i. One layer finds a triple such as x_i + x_j + x_k = 0
    mod p, which no layer of scores on two positions can. It costs T S^2: a few queries at a time, whose scores are
    computed again in the backward pass, so memory stays at `SCORES` per head; decoding reads all pairs of the cache.
    A query that sees no key reads zero. 6 M^2 parameters with as many key-value heads as heads, 1.5 times softmax's.

    Source: Alman and Song 2023, https://arxiv.org/abs/2310.04064, whose abstract states this computation over five
    given matrices, without a scale. Differs: the scale 1/K is not confirmed from the paper's text; it has no layer and
    no code, so heads, projections and the causal, masked and cross forms are ours.
    """

    complexity = "T S^2"

    def __init__(self, spec: LayerSpec):  # the core's key_dim is no choice here
        super().__init__(spec)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        causal = self.spec.pattern == Pattern.CAUSAL_SELF
        return self._pairs(q, (k, terms["k2"], v, terms["v2"]), key_mask, causal)

    def init_memory(self, batch_size: int, like: Tensor) -> PairCache:
        k, v = (like.new_empty(batch_size, 0, self.spec.kv_heads, dim) for dim in (self.key_dim, self.value_dim))
        return PairCache(k1=k, k2=k, v1=v, v2=v)

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> PairCache:
        assert isinstance(state, PairCache)  # only a context has a mask, and it is written once
        return PairCache(
            k1=torch.cat([state.k1, k], dim=1),
            k2=torch.cat([state.k2, terms["k2"]], dim=1),
            v1=torch.cat([state.v1, v], dim=1),
            v2=torch.cat([state.v2, terms["v2"]], dim=1),
            mask=key_mask,
            position=state.position + k.shape[1],
        )

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, PairCache)
        return self._pairs(q, (state.k1, state.k2, state.v1, state.v2), state.mask, False)

    def state_bytes(self, length: int) -> int:
        return 4 * length * self.spec.kv_heads * 2 * (self.key_dim + self.value_dim)

    def _pairs(self, q: Tensor, cache: tuple[Tensor, ...], key_mask: Tensor | None, causal: bool) -> Tensor:
        """q [B, T, H, K] reads k1, k2, v1 and v2 [B, S, G, ...] -> [B, T, H, V], tile by tile of queries."""
        num_queries, num_keys = q.shape[1], cache[0].shape[1]
        size = max(1, SCORES // num_keys**2)
        seen = None if key_mask is None else key_mask[:, None, None, :]
        if causal:
            past = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril()
            seen = past[None, None] if seen is None else past & seen
        with torch.autocast(q.device.type, enabled=False):
            wide_q, *memory = (repeat_heads(wide(x), self.spec.num_heads).transpose(1, 2) for x in (q, *cache))
            outputs = []
            for start in range(0, num_queries, size):
                queries = slice(start, start + size)
                keys = slice(0, min(start + size, num_keys) if causal else num_keys)
                visible = None if seen is None else seen[:, :, queries if causal else slice(None), keys]
                arguments = wide_q[:, :, queries], *(x[:, :, keys] for x in memory), visible
                outputs.append(checkpoint(_read_tile, *arguments, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(outputs, dim=2).transpose(1, 2).to(q.dtype)


def _read_tile(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, seen: Tensor | None) -> Tensor:
    """q [B, H, C, K], k1 and k2 [B, H, S, K], v1 and v2 [B, H, S, V], seen [B or 1, 1, C or 1, S] -> [B, H, C, V]."""
    num_keys = k1.shape[2]
    pairs = (q[:, :, :, None] / q.shape[-1] * k1[:, :, None]).flatten(2, 3)  # each query for each j: [B, H, C S, K]
    scores = (pairs @ k2.mT).unflatten(2, (-1, num_keys)).flatten(3)
    if seen is not None:
        both = (seen[..., :, None] & seen[..., None, :]).flatten(3)
        scores = scores.masked_fill(~both, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).unflatten(3, (num_keys, num_keys)).flatten(2, 3)
    output = ((weights @ v2).unflatten(2, (-1, num_keys)) * v1[:, :, None]).sum(3)
    return output if seen is None else output.masked_fill(~seen.any(-1, keepdim=True), 0.0)
