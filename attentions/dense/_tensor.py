"""What the exact and the low-rank form of tensor attention share: the second keys and values."""

from __future__ import annotations

from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention


class ThirdOrder(QKVAttention):
    """Attention over pairs: query i scores (j, k) by s_ijk = (1/K) sum_c q_ic k1_jc k2_kc and reads v1_j * v2_k.

    k1 and v1 are the `k` and `v` of `QKVAttention`, k2 and v2 travel beside them as terms. Rotary positions turn q and
    k1 alone: a product of three has no angle that is relative in all of them. Scores then depend on absolute positions,
    too, unless k2 is equal in the two channels of a pair.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2310.04064"

    def __init__(self, spec: LayerSpec, *, key_dim: int | None = None):
        super().__init__(spec, key_dim=key_dim)
        self.k2_proj = nn.Linear(spec.dim, spec.kv_heads * self.key_dim, bias=False)
        self.v2_proj = nn.Linear(spec.dim, spec.kv_heads * self.value_dim, bias=False)

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        k2, v2 = self.k2_proj(source), self.v2_proj(source)
        return {name: x.unflatten(-1, (self.spec.kv_heads, -1)) for name, x in (("k2", k2), ("v2", v2))}
