"""Titans MAG: memory as gate; and what it shares with MAL, a memory and a sliding window over one stream."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.dense.softmax import KVCache
from attentions.linear._neural_memory import MemoryGate
from attentions.linear.titans_lmm import TitansLMM
from attentions.local.sliding_window import SlidingWindow


@dataclass(kw_only=True)
class WindowedState(State):
    """The states of the memory and of the window, the learned tokens already read by both."""

    memory: State
    window: State


class WindowedMemory(Attention):
    """A neural memory and a sliding window over P learned tokens and the sequence; a member says how they meet.

    Args:
        window: positions that the attention sees, own included.
        num_persistent: learned tokens P before the sequence.
        depth, momentum, chunk_size, conv_size: of the memory, see `TitansLMM`.
    """

    window: SlidingWindow
    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a window needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2501.00663"
    complexity = "T S, step by step T (window + num_persistent)"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        window: int = 16,
        num_persistent: int = 4,
        depth: int = 1,
        momentum: bool = True,
        chunk_size: int = 16,
        conv_size: int = 4,
    ):
        super().__init__(spec)
        if num_persistent < 0:
            raise ValueError(f"num_persistent must be at least 0, got {num_persistent}")
        inner = replace(spec, grid=None, max_length=spec.max_length + num_persistent)
        self.memory = TitansLMM(inner, depth=depth, momentum=momentum, chunk_size=chunk_size, conv_size=conv_size)
        self.persistent = nn.Parameter(torch.randn(num_persistent, spec.dim))
        self.add_window(inner, window)

    def add_window(self, spec: LayerSpec, window: int) -> None:
        """The attention over [P; x]."""
        self.window = SlidingWindow(spec, window=window)

    @abstractmethod
    def meet(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Outputs [B, P + T, M] of [P; x] [B, P + T, M]."""

    @abstractmethod
    def meet_step(self, x: Tensor, state: WindowedState) -> tuple[Tensor, State, State]:
        """One position of [P; x]: output [B, 1, M], and the next states of memory and window."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        self._source(x, context)
        persistent = self.persistent.expand(x.shape[0], -1, -1)
        if key_mask is not None:
            key_mask = torch.cat([key_mask.new_ones(persistent.shape[:2]), key_mask], 1)
        return self.meet(torch.cat([persistent, x], 1), key_mask)[:, len(self.persistent) :]

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        state = WindowedState(memory=self.memory.init_state(batch_size), window=self.window.init_state(batch_size))
        for token in self.persistent:
            _, state = self.step(token.expand(batch_size, 1, -1), state)
        return replace(state, position=0)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, WindowedState]:
        assert isinstance(state, WindowedState)
        output, memory, window = self.meet_step(x, state)
        return output, WindowedState(memory=memory, window=window, position=state.position + 1)

    def state_bytes(self, length: int) -> int:
        length += len(self.persistent)
        return self.memory.state_bytes(length) + self.window.state_bytes(length)


class PrefixWindow(SlidingWindow):
    """A sliding window that also sees the first `prefix` positions from everywhere."""

    def __init__(self, spec: LayerSpec, *, window: int, prefix: int):
        super().__init__(spec, window=window)
        self.prefix = prefix

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        first = torch.arange(num_keys, device=device) < self.prefix
        if self.spec.causal:
            first = first & (torch.arange(num_queries, device=device)[:, None] >= torch.arange(num_keys, device=device))
        return super().visible(num_queries, num_keys, device) | first

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        assert isinstance(state, KVCache)
        k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        stop = self.prefix, max(self.prefix, k.shape[1] - self.window)
        return dataclasses.replace(
            state,
            k=torch.cat([k[:, : stop[0]], k[:, stop[1] :]], 1),
            v=torch.cat([v[:, : stop[0]], v[:, stop[1] :]], 1),
            position=state.position + k.shape[1] - state.k.shape[1],
        )

    def state_bytes(self, length: int) -> int:
        return super(SlidingWindow, self).state_bytes(min(length, self.prefix + self.window))


class MemoryAsGate(WindowedMemory):
    """A sliding window is the short-term memory and a neural memory the long-term one; the one gates the other.

    x~ = [P; x], y = window(x~), o = y gated by M(x~), see `MemoryGate`. Every position sees P beside its window.

    Args:
        window: positions that the attention sees, own included.
        num_persistent: learned tokens P before the sequence.
        depth, momentum, chunk_size, conv_size: of the memory, see `TitansLMM`.

    Source: Behrouz et al. 2024, https://arxiv.org/abs/2501.00663, section 4.2, eq. 26 to 28 and figure 3b. Differs: the
    NeurIPS 2025 version (appendix E.1) has a window of 2048 and P = 128. Noncausal: the window looks both ways and the
    memory learns from either end, ours.
    """

    def add_window(self, spec: LayerSpec, window: int) -> None:
        self.window = PrefixWindow(spec, window=window, prefix=len(self.persistent))
        self.gate = MemoryGate(spec.dim)

    def meet(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.gate(self.window(x, key_mask=key_mask), self.memory(x, key_mask=key_mask))

    def meet_step(self, x: Tensor, state: WindowedState) -> tuple[Tensor, State, State]:
        m, memory = self.memory.step(x, state.memory)
        y, window = self.window.step(x, state.window)
        return self.gate(y, m), memory, window
