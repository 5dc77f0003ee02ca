"""Tensor attention in linear time: the exponential as a polynomial of its bounded scores."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State
from attentions.dense._tensor import ThirdOrder
from attentions.linear._recurrence import masked, wide


@dataclass(kw_only=True)
class PairMemory(State):
    """Sums over positions of k1^alpha (v1, 1) and of k2^alpha (v2, 1), both [B, G, r, V + 1]."""

    first: Tensor
    second: Tensor


class TensorAttentionLowRank(ThirdOrder):
    """Tensor attention with exp(s) replaced by its Taylor polynomial of degree g, which splits over the two positions.

    With s_ijk = (1/K) sum_c q_ic k1_jc k2_kc, monomials alpha of degree at most g and c_alpha = K^-|alpha| / alpha!,

        sum_jk p_g(s_ijk) (v1_j * v2_k) = sum_alpha c_alpha q_i^alpha (sum_j k1_j^alpha v1_j) (sum_k k2_k^alpha v2_k),

    divided by the same with ones for values. There are r = C(K + g, g) monomials; causal: both sums run to i, so the
    state is 2 r (V + 1) numbers per key-value head. The polynomial is close to exp where entries are small: q, k1 and
    k2 are divided by their root mean square, which leaves |s| <= bound^3 sqrt(K).

    Args:
        key_dim: width K of one head of q, k1 and k2; r grows as K^g.
        degree: g, even, so that the polynomial is positive everywhere.
        bound: root mean square of every q, k1 and k2; at 1.5 it is the cube root of log n for n = 29 positions.

    Source: Alman and Song 2023, https://arxiv.org/abs/2310.04064, whose abstract has the problem and the condition that
    entries stay below the cube root of log n; this algorithm is read in summary, not confirmed from the paper's text.
    Differs: it has no code and no layer, so normalised entries, even degrees, and the causal, masked and cross forms
    are ours.
    """

    complexity = "(T + S) C(key_dim + degree, degree)"

    def __init__(self, spec: LayerSpec, *, key_dim: int = 4, degree: int = 2, bound: float = 1.5):
        for name, value in (("key_dim", key_dim), ("degree", degree)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if degree % 2:
            raise ValueError(
                f"degree must be even, or weights may be negative, got {degree}; "
                f"nearest: {', '.join(str(near) for near in (degree - 1, degree + 1) if near)}"
            )
        if bound <= 0:
            raise ValueError(f"bound must be positive, got {bound}")
        super().__init__(spec, key_dim=key_dim)
        self.degree, self.bound = degree, bound
        self.coefficients = [1.0]  # c_alpha in the order of `monomials`
        for size in range(1, degree + 1):
            for alpha in itertools.combinations_with_replacement(range(key_dim), size):
                repeats = math.prod(math.factorial(alpha.count(c)) for c in set(alpha))
                self.coefficients.append(1 / (repeats * key_dim**size))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            parts = self._features(k, v, key_mask), self._features(terms["k2"], terms["v2"], key_mask)
            if self.spec.pattern == Pattern.CAUSAL_SELF:
                first, second = ((k[..., None] * v[..., None, :]).cumsum(1) for k, v in parts)
                return self._read(q, first * second)
            first, second = (_total(*part) for part in parts)
            return self._read(q, (first * second)[:, None])

    def init_memory(self, batch_size: int, like: Tensor) -> PairMemory:
        shape = batch_size, self.spec.kv_heads, len(self.coefficients), self.value_dim + 1
        return PairMemory(first=wide(like.new_zeros(shape)), second=wide(like.new_zeros(shape)))

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> PairMemory:
        assert isinstance(state, PairMemory)
        with torch.autocast(k.device.type, enabled=False):
            return dataclasses.replace(
                state,
                first=state.first + _total(*self._features(k, v, key_mask)),
                second=state.second + _total(*self._features(terms["k2"], terms["v2"], key_mask)),
                position=state.position + k.shape[1],
            )

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, PairMemory)
        with torch.autocast(q.device.type, enabled=False):
            return self._read(q, (state.first * state.second)[:, None])

    def state_bytes(self, length: int) -> int:
        return 4 * self.spec.kv_heads * 2 * len(self.coefficients) * (self.value_dim + 1)

    def monomials(self, heads: Tensor) -> Tensor:
        """All x^alpha with |alpha| <= g of the normalised heads: [..., K] -> [..., r], by degree."""
        x = self.bound * F.rms_norm(wide(heads), (self.key_dim,), eps=1e-6)
        powers = [torch.ones_like(x[..., :1]), x]
        for size in range(2, self.degree + 1):
            # x_c times the monomials of one degree less that begin at c or behind: the last of them
            tails = [math.comb(self.key_dim - c + size - 2, size - 1) for c in range(self.key_dim)]
            powers.append(torch.cat([x[..., c : c + 1] * powers[-1][..., -n:] for c, n in enumerate(tails)], dim=-1))
        return torch.cat(powers, dim=-1)

    def _features(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """k^alpha [B, S, G, r] and (v, 1) [B, S, G, V + 1], zero where masked: their products are summed."""
        return self.monomials(k), masked(F.pad(wide(v), (0, 1), value=1.0), key_mask)

    def _read(self, q: Tensor, pairs: Tensor) -> Tensor:
        """q [B, T, H, K] reads products of two sums [B, T or 1, G, r, V + 1] -> [B, T, H, V]."""
        features = self.monomials(q) * wide(q).new_tensor(self.coefficients)
        grouped = features.unflatten(2, (self.spec.kv_heads, -1))  # [B, T, G, H / G, r]
        heads = (grouped @ pairs).flatten(2, 3)
        return (heads[..., :-1] / heads[..., -1:].clamp_min(1e-12)).to(q.dtype)  # nothing written: 0 / 1e-12


def _total(k: Tensor, v: Tensor) -> Tensor:
    """[B, S, G, r] and [B, S, G, V + 1] -> [B, G, r, V + 1]."""
    return torch.einsum("bsgr,bsgv->bgrv", k, v)
