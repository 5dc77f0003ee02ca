"""Selective self-attention: temperatures for queries and values."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, State
from attentions.dense.softmax import KVCache, Softmax


class Tempered(Softmax):
    """Softmax attention whose queries are multiplied by temperatures that know how many keys they may read."""

    paper = "https://arxiv.org/abs/2411.12892"

    @abstractmethod
    def sharpen(self, q: Tensor, count: Tensor) -> Tensor:
        """Queries [B, T, H, D] times their temperatures; count [B or 1, T or 1] of keys in sight."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return super().attend(self.sharpen(q, self._count(k, key_mask)), k, v, key_mask=key_mask)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        return super().read(self.sharpen(q, _ones(state.k, state.mask).sum(1, keepdim=True)), state)

    def _count(self, k: Tensor, key_mask: Tensor | None, start: int = 0) -> Tensor:
        """How many keys are in sight of each position [B or 1, S] of causal self-attention, else of all [B or 1, 1]."""
        ones = _ones(k, key_mask)
        return start + ones.cumsum(1) if self.spec.causal and not self.spec.cross else ones.sum(1, keepdim=True)


class SelectivePosOfficial(Tempered):
    """Softmax attention that sharpens with the number of keys in sight, against dilution by long contexts.

        o_i = sum_j softmax_j(tau_i q_i . k_j / sqrt(D)) v_j,   tau_i = 1 + exp(-exp(beta)) log(n_i)

    n_i is the number of keys that query i may read: i + 1 in causal self-attention, else all unmasked ones, so that
    tau is one number per sequence there. beta is one learned number per layer. Decoding caches as softmax attention.

    Args:
        beta: where it starts; 1.5 and 2 are weights of 0.011 and 0.0006.
        dropout: probability of dropping an attention weight in training.

    Source: the code of Zhang et al. 2024, https://arxiv.org/abs/2411.12892, in which this position term of the queries
    is all there is; the paper's whole layer is `Selective`. That code only fine-tunes with it (beta 1.5 for GPT-2, 2
    for other models), with an optimizer of beta's own; its programs that train from the start do without the term.
    A second form there, 1 + beta log(n) with beta from 0.00001, has no row. Differs: where keys are masked that code
    has no rule, here n counts unmasked ones; noncausal and cross forms are ours.
    """

    def __init__(self, spec: LayerSpec, *, beta: float = 1.5, dropout: float = 0.0):
        super().__init__(spec, dropout=dropout)
        self.beta = nn.Parameter(torch.tensor(float(beta)))

    def sharpen(self, q: Tensor, count: Tensor) -> Tensor:
        return q * _position_temperature((-self.beta.exp()).exp(), count)


class Selective(Tempered):
    """Softmax attention with learned temperatures: how sharply a token reads, and how much of its value is read (SSA).

        o_i = sum_j softmax_j(tau^q_i q_i . k_j / sqrt(D)) tau^v_j v_j
        tau = tanh(w_h . GELU(z)) + 1 + sigmoid(alpha) log(n)       z: the query before rotation, or the value

    n of a query is the number of keys that it may read, n of a value its own in causal self-attention (j + 1), else
    the number of all unmasked keys. w_h per head and alpha per layer are learned, for queries and for values apart: the
    layer has softmax attention's parameters and M + G D + 2. w starts at zero, and alpha where the position terms weigh
    0.011, as that of `SelectivePosOfficial` does. Scaled values are cached, so decoding costs what softmax attention's
    does.

    Args:
        dropout: probability of dropping an attention weight in training.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2411.12892: temperatures of queries and values, each a token term
    plus a position term. Differs: the formulas of both terms are not confirmed from the paper's text; the function
    inside the tanh, which the paper makes from the layer's own weights with less than 0.5 % of new parameters, is ours,
    and so are the starting values, counting under a mask, and the noncausal and cross forms. The authors' code has the
    position term of queries alone: `SelectivePosOfficial`.
    """

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0):
        super().__init__(spec, dropout=dropout)
        weight = math.exp(-math.exp(1.5))  # the start of the authors' position term
        self.alpha = nn.Parameter(torch.full((2,), math.log(weight / (1 - weight))))  # of queries, of values
        self.query_weight = nn.Parameter(torch.zeros(spec.num_heads, self.key_dim))  # w_h
        self.value_weight = nn.Parameter(torch.zeros(spec.kv_heads, self.value_dim))

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        """Queries and, as their last channel, the token term of their temperatures [B, T, H, D + 1]."""
        q = self.q_proj(x).unflatten(-1, (self.spec.num_heads, self.key_dim))
        return torch.cat([self._rotate(q, start), _token_temperature(q, self.query_weight)], dim=-1)

    def sharpen(self, q: Tensor, count: Tensor) -> Tensor:
        return q[..., :-1] * (q[..., -1:] + _position_temperature(self.alpha[0].sigmoid(), count))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return super().attend(q, k, self._weigh(v, self._count(k, key_mask)), key_mask=key_mask)

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        return super().update(state, k, self._weigh(v, self._count(k, key_mask, state.position)), key_mask=key_mask)

    def _weigh(self, v: Tensor, count: Tensor) -> Tensor:
        position = _position_temperature(self.alpha[1].sigmoid(), count)
        return v * (_token_temperature(v, self.value_weight) + position)


def _token_temperature(heads: Tensor, weight: Tensor) -> Tensor:
    """[B, S, G, D] and a weight [G, D] -> [B, S, G, 1] between -1 and 1."""
    return (F.gelu(heads) * weight.to(heads.dtype)).sum(-1, keepdim=True).tanh()


def _position_temperature(weight: Tensor, count: Tensor) -> Tensor:
    """1 + weight log(count) [B or 1, S or 1, 1, 1]; no key in sight counts as one."""
    # at least float32: bfloat16 cannot count past 256
    number = count.clamp_min(1).to(torch.promote_types(weight.dtype, torch.float32))
    return (1 + weight * number.log().to(weight.dtype))[..., None, None]


def _ones(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """A one for each key that may be read: [B or 1, S]."""
    return torch.ones(1, k.shape[1], dtype=torch.long, device=k.device) if key_mask is None else key_mask.long()
