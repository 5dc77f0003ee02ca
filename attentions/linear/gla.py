"""Gated linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec
from attentions.linear._recurrence import Recurrent, wide, width


class GatedLinearAttention(Recurrent):
    """Linear attention whose memory decays per key channel, by an amount read from the input (GLA).

    log alpha_t = logsigmoid(W_2 W_1 x_t + b) / 16 with W_1 of rank 16; scores scaled by 1 / sqrt(K); RMS norm per
    head, then a swish gate. Keys of half the value width leave room for the gate: 4 M^2 parameters, as softmax.

    Args:
        expand_k, expand_v: widths of keys and values over M / H, rounded down.
        gate_rank: rank of the decay's projection.
        gate_temperature: divides the log decay, so that decays start near 1.

    Source: Yang et al. 2023, https://arxiv.org/abs/2312.06635, section 4.4, eqs. 3 to 5; norm and absent biases as in
    the authors' code. Differs: the decay's bias is a parameter of its own, so that a backbone that re-initialises
    Linear layers keeps its start; bidirectional and cross forms are ours.
    """

    paper = "https://arxiv.org/abs/2312.06635"
    ordered = True
    chunk_size = 16  # scores with a decay per channel cost chunk * K multiplications per position, not a matrix product

    def __init__(
        self,
        spec: LayerSpec,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
    ):
        super().__init__(spec, key_dim=width(spec, expand_k), value_dim=width(spec, expand_v))
        self.gate_temperature = gate_temperature
        decay_dim = spec.kv_heads * self.key_dim
        self.decay_down = nn.Linear(spec.dim, gate_rank, bias=False)
        self.decay_up = nn.Linear(gate_rank, decay_dim, bias=False)
        self.decay_bias = nn.Parameter(torch.empty(decay_dim).uniform_(-(gate_rank**-0.5), gate_rank**-0.5))
        self.gate_proj = nn.Linear(spec.dim, spec.num_heads * self.value_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return super().query(x, start) * self.key_dim**-0.5

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        logits = wide(self.decay_up(self.decay_down(source))) + wide(self.decay_bias)
        log_decay = F.logsigmoid(logits) / self.gate_temperature
        return {"log_decay": log_decay.unflatten(-1, (self.spec.kv_heads, self.key_dim))}

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(self.norm(heads.to(self.norm.weight.dtype)).flatten(2) * F.silu(self.gate_proj(x)))
