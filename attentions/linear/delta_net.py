"""DeltaNet."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, State
from attentions.linear._recurrence import Memory, Recurrent, masked, width
from attentions.ssm._convolution import DepthwiseConv


@dataclass(kw_only=True)
class DeltaState(Memory):
    """The memory, and the last conv_size - 1 projections of q and of k and v [B, conv_size - 1, channels].

    In cross-attention k and v have no tail: the context is complete.
    """

    query_tail: Tensor
    tail: Tensor | None


class DeltaNet(Recurrent):
    """Before it writes a value under a key, the memory forgets a share beta_t of what it held there.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T with beta_t = sigmoid(w.x_t). q, k and v pass a short causal
    convolution and SiLU; q and k are then set to unit length; RMS norm per head on the output. 4 M^2 parameters.

    Args:
        expand_k, expand_v: widths of keys and values over M / H, rounded down.
        conv_size: kernel of the short convolution, in positions.

    Source: Yang et al. 2024, https://arxiv.org/abs/2406.06484, sections 3.2 and 3.4 (rule: Schlag et al. 2021,
    https://arxiv.org/abs/2102.11174). Differs: no 1 / sqrt(K) on q, as in the paper; the authors' code has one, which
    the norm undoes. One convolution over the concatenated channels of k and v stands for two. Where the backbone asks
    for rotary positions, they turn the unit vectors. Bidirectional and cross forms are ours: convolutions run in the
    direction of the recurrence, that of q over the queries, in both cross patterns causally.
    """

    paper = "https://arxiv.org/abs/2406.06484"
    ordered = True
    chunk_size = 32

    def __init__(self, spec: LayerSpec, *, expand_k: float = 1.0, expand_v: float = 1.0, conv_size: int = 4):
        super().__init__(spec, key_dim=width(spec, expand_k), value_dim=width(spec, expand_v))
        self.channels = self.k_proj.out_features, self.v_proj.out_features
        self.query_conv = DepthwiseConv(self.q_proj.out_features, conv_size)
        self.conv = DepthwiseConv(sum(self.channels), conv_size)
        self.beta_proj = nn.Linear(spec.dim, spec.kv_heads, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        return {"beta": self.beta_proj(source).sigmoid()}

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(self.norm(heads.to(self.norm.weight.dtype)).flatten(2))

    def heads(
        self, x: Tensor, source: Tensor, key_mask: Tensor | None, backward: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = masked(source, key_mask)
        raw = self.q_proj(x if self.spec.cross else source)
        return self._query(raw, backward=backward), *self._key_value(self._written(source), backward=backward)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        return self._key_value(self._written(source), start=start)

    def init_memory(self, batch_size: int, like: Tensor) -> DeltaState:
        return DeltaState(
            memory=self.empty_memory(batch_size, like),
            query_tail=self.query_conv.empty_tail(batch_size),
            tail=None if self.spec.cross else self.conv.empty_tail(batch_size),
        )

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        seen = None if context is None else masked(context, key_mask)
        return super().init_state(batch_size, seen, key_mask=key_mask)

    def state_bytes(self, length: int) -> int:
        convs = [self.query_conv] if self.spec.cross else [self.query_conv, self.conv]
        return super().state_bytes(length) + 4 * sum(conv.empty_tail(1).numel() for conv in convs)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, state = self._advance(x, state)
        return self.merge(x, self.read(q, state)), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        _, state = self._advance(x, self.init_state(x.shape[0], context, key_mask=key_mask))
        return self.forward(x, context, key_mask=key_mask), state

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The queries of x, and the state after its positions."""
        assert isinstance(state, DeltaState)
        raw = self.q_proj(x)
        q = self._query(raw, state.query_tail, state.position)
        state = dataclasses.replace(state, query_tail=self.query_conv.next_tail(raw, state.query_tail))
        if state.tail is not None:
            raw = self._written(x)
            k, v = self._key_value(raw, state.tail, state.position)
            state = dataclasses.replace(state, tail=self.conv.next_tail(raw, state.tail))
            return q, self.update(state, k, v, **self.terms(x))
        return q, state

    def _written(self, source: Tensor) -> Tensor:
        """Projections of keys and values side by side, before the convolution."""
        return torch.cat([self.k_proj(source), self.v_proj(source)], dim=-1)

    def _query(self, raw: Tensor, tail: Tensor | None = None, start: int = 0, backward: bool = False) -> Tensor:
        q = _convolve(self.query_conv, raw, tail, backward)
        return self._rotate(unit(q.unflatten(-1, (-1, self.key_dim))), start)

    def _key_value(
        self, raw: Tensor, tail: Tensor | None = None, start: int = 0, backward: bool = False
    ) -> tuple[Tensor, Tensor]:
        k, v = _convolve(self.conv, raw, tail, backward).split(self.channels, dim=-1)
        k = self._rotate(unit(k.unflatten(-1, (-1, self.key_dim))), start)
        return k, v.unflatten(-1, (-1, self.value_dim))


def _convolve(conv: DepthwiseConv, raw: Tensor, tail: Tensor | None, backward: bool) -> Tensor:
    """SiLU of the causal convolution; `backward`: of the one that looks at later positions instead."""
    return F.silu(conv(raw.flip(1)).flip(1) if backward else conv(raw, tail))


def unit(x: Tensor) -> Tensor:
    """x over its length in the last axis; zero stays zero, with a finite gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
