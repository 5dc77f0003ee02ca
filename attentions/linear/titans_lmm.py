"""Titans LMM: the neural memory alone as a token mixer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, State
from attentions.linear._neural_memory import NeuralState, learn, predict
from attentions.linear._recurrence import masked, wide
from attentions.ssm._convolution import DepthwiseConv


@dataclass(kw_only=True)
class LMMState(NeuralState):
    """The memory, and the last conv_size - 1 inputs [B, conv_size - 1, M] of the queries' stream."""

    tail: Tensor


class TitansLMM(QKVAttention):
    """A small network per head learns keys -> values by gradient descent with momentum and forgetting, and is read.

    Step theta, momentum eta and forgetting alpha are sigmoids of linear maps of the input, one per position and head.
    q, k and v pass a short causal convolution and SiLU; q and k are then set to unit length. The output has an RMS norm
    per head and a sigmoid gate. Grouped heads share a network. 5 M^2 parameters and small ones; a network of
    two layers adds 8 D^2 a head.

    Noncausal: it learns from either end with the same weights, and what the two read is averaged. Cross: it learns from
    the context, in order, and every query reads the network after the last position.

    Args:
        depth: layers of the network. 1: a matrix D x D; else q + g LN(..), 4 D wide inside, theta at most 1 / 4 D.
        momentum: whether a surprise outlives its position; False: eta = 0, gradient descent with weight decay.
        chunk_size: positions whose gradients are taken at the same weights.
        conv_size: kernel of the short convolutions, in positions.

    Source: Behrouz et al. 2024, https://arxiv.org/abs/2501.00663, sections 3.1, 3.2 and 4.4; network, chunk and kernel:
    the NeurIPS 2025 version, section 3.3 and appendix E.1. There is no official code. Differs: that version forgets
    channel by channel and has rates for each layer of the network; ours share a scalar alpha, as in the first version,
    theta and eta. Its network is x + LN(W_1 GELU(W_2 x)), by default of two layers. Ours, as neither version gives it:
    one layer is the matrix W of section 3.2, more than two repeat the hidden one, g is learned in training alone, a
    network for each head, starts, initial rates, the bound of theta and LN's epsilon of 0.1. Rotary positions, where a
    backbone asks for them, turn the unit vectors. Noncausal and cross forms are ours.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2501.00663"
    complexity = "T chunk_size depth"

    def __init__(
        self, spec: LayerSpec, *, depth: int = 1, momentum: bool = True, chunk_size: int = 16, conv_size: int = 4
    ):
        super().__init__(spec)
        for name, number in {"depth": depth, "chunk_size": chunk_size}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.chunk_size, self.momentum = chunk_size, momentum
        groups, width = spec.kv_heads, spec.head_dim
        self.query_conv = DepthwiseConv(self.q_proj.out_features, conv_size)
        self.conv = DepthwiseConv(self.k_proj.out_features + self.v_proj.out_features, conv_size)
        self.rate_proj = nn.Linear(spec.dim, (2 + momentum) * groups, bias=False)
        # theta / max_step, alpha, eta to begin with: a chunk of equal keys must not overshoot
        rates = torch.tensor([0.5 / chunk_size, 0.01, 0.5])[: 2 + momentum]
        self.rate_bias = nn.Parameter(rates.logit().repeat_interleave(groups))
        widths = [width, *[4 * width] * (depth - 1), width]
        sizes = [1, *widths[1:-1]]  # of what enters a layer, squared: unit keys, then activations of order one
        self.max_step = 1 / sizes[-1]  # what enters scales the gradient: longer steps explode
        starts = [torch.randn(groups, *pair) / size**0.5 for pair, size in zip(pairwise(widths), sizes, strict=True)]
        self.start = nn.ParameterList(starts if depth > 1 else [torch.zeros(groups, width, width)])
        self.gain = nn.Parameter(torch.ones(groups, width)) if depth > 1 else None
        self.gate_proj = nn.Linear(spec.dim, spec.dim, bias=False)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def query(self, x: Tensor, start: int = 0, tail: Tensor | None = None) -> Tensor:
        """Queries [B, T, H, D]; `tail` [B, conv_size - 1, M] holds the inputs before x, None means there are none."""
        q = _short([self.q_proj], self.query_conv, x, tail).unflatten(-1, (-1, self.key_dim))
        return self._rotate(F.normalize(q, dim=-1), start)

    def key_value(self, source: Tensor, start: int = 0, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, G, D]; `tail` as in `query`."""
        both = _short([self.k_proj, self.v_proj], self.conv, source, tail).unflatten(-1, (-1, self.key_dim))
        k, v = both.chunk(2, dim=2)
        return self._rotate(F.normalize(k, dim=-1), start), v

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        logits = wide(self.rate_proj(source)) + wide(self.rate_bias)
        step, forget, *momentum = logits.split(self.spec.kv_heads, dim=-1)
        terms = {"step": self.max_step * step.sigmoid(), "log_keep": F.logsigmoid(-forget)}
        return {**terms, "log_momentum": F.logsigmoid(momentum[0])} if momentum else terms

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(self.norm(heads.to(self.norm.weight.dtype)).flatten(2) * self.gate_proj(x).sigmoid())

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source = masked(self._source(x, context), key_mask)
        heads = self._heads(x if self.spec.cross else source, source, key_mask)
        if self.spec.pattern == Pattern.NONCAUSAL_SELF:
            source, mask = source.flip(1), None if key_mask is None else key_mask.flip(1)
            heads = (heads + self._heads(source, source, mask).flip(1)) / 2
        return self.merge(x, heads)

    def _heads(self, x: Tensor, source: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.attend(self.query(x), *self.key_value(source), key_mask=key_mask, **self.terms(source))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        state = self.init_memory(k.shape[0], k)
        if self.spec.cross:
            return self.read(q, self.update(state, k, v, key_mask=key_mask, **terms))
        return self.learn(state, k, v, q, key_mask=key_mask, **terms)[0]

    def init_memory(self, batch_size: int, like: Tensor) -> LMMState:
        weights = tuple(wide(start).expand(batch_size, -1, -1, -1).clone() for start in self.start)
        return LMMState(
            weights=weights,
            start=weights,
            surprise=tuple(torch.zeros_like(weight) for weight in weights) if self.momentum else (),
            tail=like.new_zeros(batch_size, self.query_conv.kernel_size - 1, self.spec.dim),
        )

    def learn(
        self, state: LMMState, k: Tensor, v: Tensor, q: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> tuple[Tensor, LMMState]:
        with torch.autocast(k.device.type, enabled=False):
            return learn(state, k, v, q, key_mask=key_mask, chunk_size=self.chunk_size, gain=self._gain(), **terms)

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> State:
        assert isinstance(state, LMMState)
        state = self.learn(state, k, v, k[:, :0], key_mask=key_mask, **terms)[1]
        return dataclasses.replace(state, start=(), surprise=()) if self.spec.cross else state

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, LMMState)
        with torch.autocast(q.device.type, enabled=False):
            return predict(state.weights, q, self._gain())

    def _gain(self) -> Tensor | None:
        return None if self.gain is None else wide(self.gain)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> LMMState:
        seen = None if context is None else masked(context, key_mask)
        state = super().init_state(batch_size, seen, key_mask=key_mask)
        assert isinstance(state, LMMState)
        return state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, LMMState)
        q, after = self.advance(x, state)
        return self.merge(x, self.read(q, after)), after

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0], context, key_mask=key_mask)
        return self.forward(x, context, key_mask=key_mask), self.advance(x, state)[1]

    def state_bytes(self, length: int) -> int:
        copies = 1 if self.spec.cross else 2 + self.momentum
        tail = (self.query_conv.kernel_size - 1) * self.spec.dim
        return 4 * (copies * sum(start.numel() for start in self.start) + tail)

    def advance(self, x: Tensor, state: LMMState, *, key_mask: Tensor | None = None) -> tuple[Tensor, LMMState]:
        """The queries of x [B, T, M] and, in self-attention, the state after its positions; masked inputs are zeros."""
        q = self.query(x, state.position, state.tail)
        tail = torch.cat([state.tail, x], 1)[:, x.shape[1] :].clone()  # clone: a view would keep all inputs alive
        if not self.spec.cross:
            k, v = self.key_value(x, state.position, state.tail)
            state = self.learn(state, k, v, k[:, :0], key_mask=key_mask, **self.terms(x))[1]
        return q, dataclasses.replace(state, tail=tail)


def _short(projections: Sequence[nn.Linear], conv: DepthwiseConv, x: Tensor, tail: Tensor | None) -> Tensor:
    """SiLU of the causal convolution of projections of x, side by side; `tail`: the inputs before x."""
    stream = x if tail is None else torch.cat([tail, x], 1)
    raw = torch.cat([proj(stream) for proj in projections], -1)
    return F.silu(conv(raw)[:, stream.shape[1] - x.shape[1] :])
