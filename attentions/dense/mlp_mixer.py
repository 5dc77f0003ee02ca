"""MLP-Mixer: an MLP along the sequence."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern
from attentions.dense._template import TokenMixer, hide
from attentions.linear._recurrence import masked


class MLPMixer(TokenMixer):
    """Y = W_2 gelu(W_1 X) with W_1 [hidden, L] and W_2 [L, hidden] over positions, the same for every channel.

    L is the slot's `max_length`. A shorter sequence uses the first columns of W_1 and rows of W_2, as if the rest were
    zeros; a longer one is refused. A masked position is a zero input. Since gelu(z) = z Phi(z), channel c is multiplied
    by W_2 diag(Phi(W_1 x_c)) W_1, a matrix that depends on the input: in the template every channel is a head, W is the
    identity, and channels are not mixed. 2 L hidden parameters: 1.0 of softmax's at M = 32, L = 128 and hidden = 16.
    Positions that training never reached keep their initial weights.

    Args:
        hidden: width of the MLP, D_S.

    Source: Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, the token-mixing half of its eq. 1 without norm
    and residual, which a backbone has; one member of the unified view of https://arxiv.org/abs/2302.06218. Differs: no
    biases, which the authors' code has; GELU is exact; variable lengths and masks are ours.
    """

    patterns = Pattern.NONCAUSAL_SELF
    impossible: ClassVar = {
        Pattern.CAUSAL_SELF: "each hidden unit of the MLP reads the whole sequence, and every position reads each unit",
        Pattern.CROSS: "its weights belong to positions of one sequence, and queries do not enter them",
    }
    paper = "https://arxiv.org/abs/2105.01601"
    complexity = "T hidden"

    def __init__(self, spec: LayerSpec, *, hidden: int = 256):
        super().__init__(spec)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        # drawn as nn.Linear's, and no Linear layers, so that a backbone that draws those anew keeps their start
        bounds = spec.max_length**-0.5, hidden**-0.5
        self.weight_in = nn.Parameter(torch.empty(hidden, spec.max_length).uniform_(-bounds[0], bounds[0]))  # W_1
        self.weight_out = nn.Parameter(torch.empty(spec.max_length, hidden).uniform_(-bounds[1], bounds[1]))  # W_2

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        weight_in, weight_out = self._weights(self._source(x, context).shape[1])
        return weight_out @ F.gelu(weight_in @ masked(x, key_mask))

    def matrix(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        weight_in, weight_out = self._weights(x.shape[1])
        hidden = (weight_in @ masked(x, key_mask)).mT  # [B, M, hidden]
        gate = (1 + torch.erf(hidden / math.sqrt(2))) / 2  # Phi
        return hide(weight_out @ (gate[..., None] * weight_in), key_mask)

    def values(self, source: Tensor) -> Tensor:
        return source[..., None]

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return heads[..., 0]

    def _weights(self, length: int) -> tuple[Tensor, Tensor]:
        if length > self.spec.max_length:
            raise ValueError(f"the MLP covers max_length={self.spec.max_length} positions, got {length}")
        return self.weight_in[:, :length], self.weight_out[:length]
