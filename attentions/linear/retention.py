"""Retention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, rotary
from attentions.linear._recurrence import Recurrent, wide, width


class Retention(Recurrent):
    """Linear attention with a fixed decay per head, gamma_h = 1 - 2^(-5 - h), and q, k rotated by position (RetNet).

    q k^T / sqrt(K) times gamma^(n - m), then a group norm per head and a swish gate. Grouped heads share the decay of
    their key-value head. In cross-attention queries have no position in the context: all of them read from its end, so
    the key at m of S fades and turns with its distance S - 1 - m, and queries are not turned.

    Args:
        rotary_base: base of its own rotation, which the backbone's replaces where there is one; None: no own rotation.
        expand_v: width of values over that of keys. The paper takes 2 and halves the MLP in exchange; with 1 the layer
            has 5 M^2 parameters (softmax: 4 M^2) and the same MLP as the other rows.

    Source: Sun et al. 2023, https://arxiv.org/abs/2307.08621, eqs. 5, 6 and 8; decays and gate as in the authors' code.
    Differs: scores are not divided by their row sums, which the norm undoes; the norm has no affine part (as in the
    code) but subtracts the mean (as in the paper; the code's does not); frequencies are base^(-2j/K), where the code's
    grid includes both ends; bidirectional and cross forms are ours.
    """

    paper = "https://arxiv.org/abs/2307.08621"
    ordered = True

    def __init__(self, spec: LayerSpec, *, rotary_base: float | None = 10000.0, expand_v: float = 1.0):
        super().__init__(spec, value_dim=width(spec, expand_v))
        self.rotary_base = rotary_base if spec.rotary_base is None else spec.rotary_base
        if self.rotary_base is not None and self.key_dim % 2:
            raise ValueError(
                f"retention rotates pairs of channels and needs an even width per head, got {self.key_dim}; "
                f"nearest: {max(2, self.key_dim - 1)}, {self.key_dim + 1}, or rotary_base=null"
            )
        self.gate_proj = nn.Linear(spec.dim, spec.num_heads * self.value_dim, bias=False)

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return super().query(x, start) * self.key_dim**-0.5

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(source, start)
        if self.spec.cross and self.rotary_base is not None:
            k = rotary(k, base=self.rotary_base, start=1 - source.shape[1])
        return k, v

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        head = torch.arange(self.spec.kv_heads, device=source.device, dtype=wide(source).dtype)
        return {"log_decay": torch.log1p(-(2.0 ** (-5 - head)))}  # log gamma_h

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        normed = F.layer_norm(heads, heads.shape[-1:], eps=1e-6)
        return self.out_proj(normed.flatten(2) * F.silu(self.gate_proj(x)))

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        if self.rotary_base is None or self.spec.cross:
            return heads
        return rotary(heads, base=self.rotary_base, start=start)
