"""Longformer's attention: a sliding window and a few global tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.dense.softmax import KVCache, Softmax


class Longformer(Softmax):
    """Each query reads the nearest positions and the first `num_global` ones, which in turn read everything.

    One softmax over both sets, a global token within the window counted once:

        i reads j  where  |i - j| = a dilation, a = 0 .. window - 1,  or j < num_global

    Noncausal: global queries read every position, through projections of their own (Q_g, K_g, V_g), 7 M^2 parameters
    where softmax attention has 4 M^2; `separate_global=False` shares them. Causal: the same sets without the future.
    A global token then has only the global tokens before it to read, so there are no separate projections; decoding
    keeps the global tokens and (window - 1) dilation + 1 recent positions.

    The window costs two (noncausal: three) blocks of `window` scores per query, not T.

    Args:
        window: positions seen to one side, own included, at least 1.
        num_global: global tokens, the first positions; 0 leaves the window alone. A masked one is not read.
        dilation: distance between the positions of a window, one number or one per head.
        separate_global: projections of their own for the global queries and what they read (noncausal).
        dropout, bias: as in softmax attention.

    Source: Beltagy et al. 2020, https://arxiv.org/abs/2004.05150, section 3.1. Which projection reads what follows
    the authors' code: a local query reads global tokens through the local ones. Differs: the paper's causal model has
    no global tokens; its window w is w / 2 to each side, here window - 1; Q_g, K_g, V_g start apart, where the paper
    copies pretrained Q, K, V.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a window needs a distance, and queries and context share no positions"}
    complexity = "T (window + num_global)"
    paper = "https://arxiv.org/abs/2004.05150"
    full_budget = staticmethod(lambda length: {"window": length, "separate_global": False})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        window: int,
        num_global: int = 1,
        dilation: int | Sequence[int] = 1,
        separate_global: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        dilations = [dilation] * spec.num_heads if isinstance(dilation, int) else list(dilation)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if num_global < 0:
            raise ValueError(f"num_global must be at least 0, got {num_global}")
        if len(dilations) != spec.num_heads:
            raise ValueError(f"dilation needs one number or {spec.num_heads}, one per head, got {len(dilations)}")
        if min(dilations) < 1:
            raise ValueError(f"dilation must be at least 1, got {min(dilations)}")
        self.window, self.num_global, self.dilations = window, num_global, dilations
        self.separate = separate_global and num_global > 0 and not spec.causal
        if self.separate:
            self.q_global = nn.Linear(spec.dim, spec.num_heads * self.key_dim, bias=bias)
            self.k_global = nn.Linear(spec.dim, spec.kv_heads * self.key_dim, bias=bias)
            self.v_global = nn.Linear(spec.dim, spec.kv_heads * self.value_dim, bias=bias)

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        if not self.separate:
            return {}
        q = self.q_global(source[:, : self.num_global]).unflatten(-1, (self.spec.num_heads, -1))
        k, v = (part(source).unflatten(-1, (self.spec.kv_heads, -1)) for part in (self.k_global, self.v_global))
        return {"q_global": self._rotate(q, 0), "k_global": self._rotate(k, 0), "v_global": v}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        real = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        heads = self._per_dilation(lambda dilation, q, k, v: self._banded(q, k, v, real, dilation), q, k, v)
        if self.spec.causal or not self.num_global:
            return heads
        q = terms.get("q_global", q[:, : self.num_global])
        k, v = terms.get("k_global", k), terms.get("v_global", v)
        return torch.cat([self._sdpa(q, k, v, real[:, None, None, :], False), heads[:, self.num_global :]], dim=1)

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        cache = super().update(state, k, v)
        if cache.k.shape[1] <= (held := self.num_global + self._span):
            return cache

        def trim(x: Tensor) -> Tensor:  # copies, so the dropped positions are freed
            return torch.cat([x[:, : self.num_global], x[:, self.num_global - held :]], dim=1)

        return dataclasses.replace(cache, k=trim(cache.k), v=trim(cache.v))

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(min(length, self.num_global + self._span))

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        slot = torch.arange(state.k.shape[1], device=q.device)
        behind = len(slot) - 1 - slot  # right for the recent positions; the global ones need none

        def recent(dilation: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            near = (behind % dilation == 0) & (behind < self.window * dilation)
            return self._sdpa(q, k, v, (near | (slot < self.num_global))[None, None, None], False)

        return self._per_dilation(recent, q, state.k, state.v)

    @property
    def _span(self) -> int:
        """Positions from the oldest that a window holds to the query's own."""
        return (self.window - 1) * max(self.dilations) + 1

    def _per_dilation(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend(dilation, q, k, v) for the heads that share a dilation."""
        if len(kinds := sorted(set(self.dilations))) == 1:
            return attend(kinds[0], q, k, v)
        k, v = repeat_heads(k, self.spec.num_heads), repeat_heads(v, self.spec.num_heads)
        order = sorted(range(self.spec.num_heads), key=self.dilations.__getitem__)
        parts = []
        for kind in kinds:
            own = [head for head in order if self.dilations[head] == kind]
            parts.append(attend(kind, q[:, :, own], k[:, :, own], v[:, :, own]))
        return torch.cat(parts, dim=2)[:, :, [order.index(head) for head in range(self.spec.num_heads)]]

    def _banded(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, dilation: int) -> Tensor:
        """Window and global keys for every query: positions of one residue modulo `dilation` form a row of blocks.

        q [B, T, H, K]; k, v [B, T, G, D]; real [B, T] bool; returns [B, T, H, V].
        """
        batch, length = q.shape[:2]
        size = min(self.window, math.ceil(length / dilation))
        count = math.ceil(length / (dilation * size))
        num_global, sides = min(self.num_global, length), 2 if self.spec.causal else 3
        position = torch.arange(count * size * dilation, device=q.device)

        def blocks(x: Tensor) -> Tensor:  # [B, T, ...] -> [B, dilation, count, size, ...]
            x = _padded(x, 1, 0, len(position) - x.shape[1])
            return x.unflatten(1, (count, size, dilation)).movedim(3, 1)

        def around(x: Tensor) -> Tensor:  # each block between its neighbours, [B, dilation, count, sides * size, ...]
            x = _padded(blocks(x), 2, 1, sides - 2)
            return torch.cat([x[:, :, n : n + count] for n in range(sides)], dim=3)

        def with_global(x: Tensor) -> Tensor:
            first = x[:, None, None, :num_global].expand(-1, dilation, count, *(-1,) * (x.dim() - 1))
            return torch.cat([first, around(x)], dim=3).flatten(0, 2)

        behind = torch.arange(size, device=q.device)[:, None] + size - torch.arange(sides * size, device=q.device)
        near = (behind >= 0 if self.spec.causal else behind > -self.window) & (behind < self.window)
        near = near & around(real & (position[:length] >= num_global))[..., None, :]
        first = real[:, None, None, None, :num_global].expand(-1, dilation, count, size, -1)
        if self.spec.causal:
            first = first & (position[:num_global] <= blocks(position[None])[..., None])
        visible = torch.cat([first, near], dim=-1).flatten(0, 2)
        heads = self._sdpa(blocks(q).flatten(0, 2), with_global(k), with_global(v), visible[:, None], False)
        return heads.unflatten(0, (batch, dilation, count)).movedim(1, 3).flatten(1, 3)[:, :length]


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """x with zeros (False) before and after its entries along `dim`."""
    empty = [x.new_zeros(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in (before, after)]
    return torch.cat([empty[0], x, empty[1]], dim=dim)
