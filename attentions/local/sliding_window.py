"""Sliding-window attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State
from attentions.dense.softmax import KVCache, Softmax


class SlidingWindow(Softmax):
    """Each query reads the `window` nearest positions, its own included.

    Causal: the `window` most recent positions. Noncausal: fewer than `window` away to either side, so
    2 * window - 1 in all. With window >= T it is softmax attention.

    All positions at once cost what softmax attention does: all scores, under a mask. At T = 64 and window 16 that is
    faster on a CPU than reading a band. A decoding step costs the window.

    Args:
        window: positions seen, own included, at least 1.
        dropout, bias: as in softmax attention.

    Source: Beltagy et al. 2020, https://arxiv.org/abs/2004.05150, section 3.1, without the global tokens.
    Differs: Zoology's "window w" sees w + 1 positions.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a window needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2004.05150"
    complexity = "T S, step by step T window"
    full_budget = staticmethod(lambda length: {"window": length})

    def __init__(self, spec: LayerSpec, *, window: int, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, dropout=dropout, bias=bias)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        behind = torch.arange(num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)
        if self.spec.causal:
            return (behind >= 0) & (behind < self.window)
        return behind.abs() < self.window

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        cache = super().update(state, k, v, key_mask=key_mask)
        return dataclasses.replace(
            cache,
            # clone: a view would keep the dropped positions alive
            k=cache.k[:, -self.window :].clone(),
            v=cache.v[:, -self.window :].clone(),
            mask=None if cache.mask is None else cache.mask[:, -self.window :].clone(),
        )

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(min(length, self.window))
