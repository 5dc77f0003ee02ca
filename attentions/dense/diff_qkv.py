"""DiffQKV attention: queries, keys and values of different numbers and widths."""

from __future__ import annotations

import dataclasses
import math

import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, repeat_heads
from attentions.dense.softmax import KVCache, Softmax


class DiffQKV(Softmax):
    """Softmax attention that shrinks its keys, keeps its values and widens what makes its queries (Sigma).

        q = W_q x, augmented: W_d (silu(W_g u) * W_u u) of u = W_q x;     W_g, W_u: M to augq_ratio M, W_d: back
        k_h = lift(k'_c),  c = h n_k / H  k' of width d_k' is all that is cached; no lift where d_k' = D
        head_h = softmax(q_h k_h^T / sqrt(D)) v_g,  g = h n_v / H

    Of the backbone's G key-value heads, n_k of `key_heads` and n_v of `value_heads` remain: the largest divisors of G
    up to the fraction asked for, at least one, so the state is never larger than asked for; the published model has
    n_k = 4 and n_v = 16 of G = 16 (H = 32). The state holds n_k d_k' + n_v D numbers per position, at those numbers
    37.5 % less than with G. Keys are lifted as they are read, by one linear map for all heads, and rotary positions
    turn them behind the lift, at width D. Parameters: M (n_k d_k' + n_v D + 2 M), d_k' D of the lift, and of augmented
    queries 3 augq_ratio M^2, as many as a gated feed-forward layer of that width has.

    Args:
        key_heads, value_heads: n_k / G and n_v / G, above 0 and at most 1.
        key_width: d_k' / D, rounded to at least 1, above 0 and at most 1; 1: no lift.
        augq_ratio: width of W_g and W_u over M; None: queries as they are projected.
        dropout: probability of dropping an attention weight in training.

    Source: Lin et al. 2025, https://arxiv.org/abs/2501.13629, section 2, tables 1 to 4, 13 and 14; the augmented query
    is that of the listing in appendix E, with the activation of table 14. Differs: the paper calls the map of the keys
    a feed-forward layer without saying more, so the linear lift and its sharing by all heads are ours, and so is
    rotating behind it; selective loading of values, an approximation when decoding, is left out; where nothing is
    rotated the lift could move into the query, which this decoder does not do; no map has a bias, of which the listing
    says nothing; noncausal and cross forms are ours.
    """

    paper = "https://arxiv.org/abs/2501.13629"
    full_budget = staticmethod(
        lambda length: {"key_heads": 1.0, "value_heads": 1.0, "key_width": 1.0, "augq_ratio": None}
    )

    def __init__(
        self,
        spec: LayerSpec,
        *,
        key_heads: float,
        value_heads: float = 1.0,
        key_width: float = 1.0,
        augq_ratio: float | None = None,
        dropout: float = 0.0,
    ):
        for name, fraction in (("key_heads", key_heads), ("value_heads", value_heads), ("key_width", key_width)):
            if not 0 < fraction <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {fraction}; nearest: 1")
        if augq_ratio is not None and augq_ratio <= 0:
            raise ValueError(f"augq_ratio must be above 0 or null, got {augq_ratio}; nearest: {1 / spec.dim:.2g}")
        numbers = [_divisor(spec.kv_heads, fraction) for fraction in (key_heads, value_heads)]
        # groups that share nothing: what the slot calls its key-value heads
        super().__init__(dataclasses.replace(spec, num_kv_heads=math.gcd(*numbers)), dropout=dropout)
        self.num_key_heads, self.num_value_heads = numbers
        self.stored_dim = max(1, math.floor(key_width * spec.head_dim + 0.5))  # d_k'
        self.k_proj = nn.Linear(spec.dim, self.num_key_heads * self.stored_dim, bias=False)
        self.v_proj = nn.Linear(spec.dim, self.num_value_heads * self.value_dim, bias=False)
        narrow = self.stored_dim < self.key_dim
        self.lift = nn.Linear(self.stored_dim, self.key_dim, bias=False) if narrow else None
        self.augment: nn.Module = nn.Identity()
        if augq_ratio is not None:
            self.augment = Gated(spec.dim, max(1, math.floor(augq_ratio * spec.dim + 0.5)))

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return self._rotate(self.augment(self.q_proj(x)).unflatten(-1, (self.spec.num_heads, -1)), start)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """What is written: keys [B, S, n_k, d_k'], rotated unless a lift is to come, and values [B, S, n_v, D]."""
        k = self.k_proj(source).unflatten(-1, (self.num_key_heads, -1))
        v = self.v_proj(source).unflatten(-1, (self.num_value_heads, -1))
        return (self._rotate(k, start) if self.lift is None else k), v

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        if self.lift is not None:
            k = self._rotate(self.lift(k), 0)  # keys are always read from the first on
        if k.shape[2] != v.shape[2]:  # SDPA's grouped heads need as many keys as values
            k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        return super()._sdpa(q, k, v, visible, is_causal)

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        return KVCache(
            k=like.new_empty(batch_size, 0, self.num_key_heads, self.stored_dim),
            v=like.new_empty(batch_size, 0, self.num_value_heads, self.value_dim),
        )

    def state_bytes(self, length: int) -> int:
        return 4 * length * (self.num_key_heads * self.stored_dim + self.num_value_heads * self.value_dim)


class Gated(nn.Module):
    """W_d (silu(W_g u) * W_u u): [B, T, M] -> [B, T, M], `width` channels inside."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)  # W_g
        self.up = nn.Linear(dim, width, bias=False)  # W_u
        self.down = nn.Linear(width, dim, bias=False)  # W_d

    def forward(self, u: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(u)) * self.up(u))


def _divisor(heads: int, fraction: float) -> int:
    """The largest divisor of `heads` up to fraction * heads, at least 1."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n <= fraction * heads or n == 1))
