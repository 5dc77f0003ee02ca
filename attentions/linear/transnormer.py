"""TransNormerLLM's token mixer: gated lightning attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern
from attentions.linear._recurrence import wide
from attentions.linear.lightning import LightningAttention


class TransNormer(LightningAttention):
    """Lightning attention with SiLU on q and k, learned angles in the first layer, and a gate: TransNormerLLM's GLA.

    O = [Norm([(Q K^T) * M] V) * U] W_o with Q = silu(x W_q), K = silu(x W_k), V = x W_v, U = x W_u: 5 M^2 parameters,
    5/4 of softmax's. In the first of the mechanism's layers scores are sum_c q_c k_c cos(theta_c (t - s)), LRPE-d: q
    and k at position p become [x cos(p theta), x sin(p theta)], twice as wide, and so is that layer's state. theta is
    learned, one angle per channel and key-value head. Later layers have the decay alone.

    Where there is no distance, in cross-attention, there are neither angles nor decay. Rotary positions of the backbone
    do not enter: the mechanism has its own.

    Args:
        decay, schedule: as in `LightningAttention`.

    Source: Qin et al. 2024, https://arxiv.org/abs/2405.17381, eqs. 9 to 11 and 14 (first in Qin et al. 2023,
    https://arxiv.org/abs/2307.14995); W_o, no biases, the norm's eps and theta's start 10000^(-2j / M), j over the
    channels of all heads, from the released models' code. The block's other half is `conf/backbone/transnormer.yaml`.
    Differs: eq. 9 has a complex exponential, of which the code and we take the real part; grouped heads share the
    angles of their key-value head. An example in the authors' repository also has SiLU on values, a layer norm and a
    sigmoid gate of low rank: a later design, not this one.
    """

    paper = "https://arxiv.org/abs/2307.14995"

    def __init__(self, spec: LayerSpec, *, decay: str = "repo", schedule: str = "chunk"):
        super().__init__(spec, decay=decay, schedule=schedule)
        self.gate_proj = nn.Linear(spec.dim, spec.num_heads * self.value_dim, bias=False)  # W_u
        self.theta: nn.Parameter | None = None
        if spec.pattern in Pattern.SELF and spec.layer == 0:
            channels = spec.kv_heads * self.key_dim
            start = 10000.0 ** (-2 / channels * torch.arange(channels))
            self.theta = nn.Parameter(start.reshape(spec.kv_heads, self.key_dim))

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return self._turned(F.silu(super().query(x, start)), start)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(source, start)
        return self._turned(F.silu(wide(k)), start), v

    def _turned(self, heads: Tensor, start: int) -> Tensor:
        """[B, T, H or G, K], the first at position `start` -> [B, T, H or G, 2 K] in the first layer."""
        if self.theta is None:
            return heads
        theta = wide(self.theta).repeat_interleave(heads.shape[2] // self.spec.kv_heads, dim=0)
        position = torch.arange(start, start + heads.shape[1], device=heads.device, dtype=theta.dtype)
        angle = position[:, None, None] * theta
        return torch.cat([heads * angle.cos(), heads * angle.sin()], dim=-1)

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        return heads

    def empty_memory(self, batch_size: int, like: Tensor) -> Tensor:
        key_dim = self.key_dim * (1 if self.theta is None else 2)
        return wide(like.new_zeros(batch_size, self.spec.kv_heads, key_dim, self.value_dim))

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj((self.normed(heads) * self.gate_proj(x)).to(self.out_proj.weight.dtype))
