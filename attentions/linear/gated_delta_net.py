"""Gated DeltaNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec
from attentions.linear._recurrence import step_bias, wide
from attentions.linear.delta_net import DeltaNet


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose memory also decays as a whole, by an amount read from the input; swish gate on the output.

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - alpha_t S_{t-1}^T k_t)^T with Mamba-2's decay per head,
    log alpha_t = -exp(A) softplus(w.x_t + b).

    Args:
        expand_k, expand_v: widths of keys and values over M / H, rounded down. The paper takes 0.75 and 1.5, 6 M^2
            parameters; 0.5 and 1 keep its values twice as wide as keys and give 4 M^2, as softmax.
        conv_size: kernel of the short convolution, in positions.

    Source: Yang et al. 2024b, https://arxiv.org/abs/2412.06464, eq. 10 and section 3.4; A, b and their start from the
    authors' code: exp(A) uniform in (0, 16], softplus(b) log-uniform in [0.001, 0.1]. Differs: as DeltaNet.
    """

    paper = "https://arxiv.org/abs/2412.06464"

    def __init__(self, spec: LayerSpec, *, expand_k: float = 0.5, expand_v: float = 1.0, conv_size: int = 4):
        super().__init__(spec, expand_k=expand_k, expand_v=expand_v, conv_size=conv_size)
        self.A_log = nn.Parameter((16 * (1 - torch.rand(spec.kv_heads))).log())
        self.dt_bias = nn.Parameter(step_bias(spec.kv_heads))
        self.decay_proj = nn.Linear(spec.dim, spec.kv_heads, bias=False)
        self.gate_proj = nn.Linear(spec.dim, spec.num_heads * self.value_dim, bias=False)

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        step = F.softplus(wide(self.decay_proj(source)) + wide(self.dt_bias))
        return {**super().terms(source), "log_decay": -wide(self.A_log).exp() * step}

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(self.norm(heads.to(self.norm.weight.dtype)).flatten(2) * F.silu(self.gate_proj(x)))
