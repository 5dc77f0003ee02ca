"""Faults of decoding: a wrong step, a state shared, changed or miscounted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attentions.base import Pattern, State, UnsupportedPattern
from attentions.dense.softmax import KVCache, Softmax
from attentions.linear._recurrence import Memory
from attentions.linear.linear import Linear
from attentions.local.sliding_window import SlidingWindow
from faulty.registry import caught


@caught("step_by_step", "T=37, step against forward: differs by .* position 1")
class OverwrittenState(Softmax):
    """A step replaces what was written instead of adding to it."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        return KVCache(k=k, v=v, mask=keywords.get("key_mask"), position=state.position + k.shape[1])


@caught("step_by_step", "rotary positions")
class ForgetfulRotation(Softmax):
    """Every step turns its query as if it stood at position 0."""

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return super().query(x, 0)


@caught("step_by_step", "masked context")
class UnmaskedDecoding(Softmax):
    """Decoding forgets which keys of the context are padding."""

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        return super().init_state(batch_size, context)


@caught("step_by_step", "has no decode state; write init_state and step")
class NoDecoding(Softmax):
    """Causal, and silent about why it cannot decode."""

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        raise UnsupportedPattern(f"{type(self).__name__} has no decode state")


@caught("prefill", "prompt of 1: steps after prefill against forward")
class ShortPrefill(Softmax):
    """The state after a prompt lacks its last position."""

    patterns = Pattern.CAUSAL_SELF

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        output, _ = super().prefill(x)
        return output, super().prefill(x[:, :-1])[1] if x.shape[1] > 1 else self.init_state(x.shape[0])


@caught("state_apart", "step changes the state it was given .*state.memory")
class InPlaceStep(Linear):
    """Writes into the state that it was passed."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> State:
        new = super().update(state, k, v, **keywords)
        assert isinstance(state, Memory) and isinstance(new, Memory)
        return dataclasses.replace(new, memory=state.memory.copy_(new.memory))


@caught("state_apart", "two branches of a state|two decodes side by side|passed twice")
class StateOnTheModule(Softmax):
    """Keeps the cache on itself and hands out a token for it."""

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        self.cache = super().init_memory(batch_size, like)
        return self.cache

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        self.cache = super().update(self.cache, k, v, **keywords)
        return self.cache


@dataclass(kw_only=True)
class Hoard(KVCache):
    """State whose tensors stand in a dictionary, which `nbytes` does not look into."""

    more: dict[str, Tensor] = field(default_factory=dict)


@caught("state_bytes", "after 34 positions the state holds .* bytes and reports")
class UncountedState(Softmax):
    """Carries more than it reports."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        new = super().update(state, k, v, **keywords)
        return Hoard(k=new.k, v=new.v, mask=new.mask, position=new.position, more={"spare": torch.zeros(1000)})


@caught("state_bytes", "H=6, after 34 positions the state holds 3264 bytes, by state_bytes\\(\\) 9792")
class FormulaOfQueryHeads(Softmax):
    """Counts query heads where key-value heads are stored."""

    def state_bytes(self, length: int) -> int:
        return 4 * length * self.spec.num_heads * (self.key_dim + self.value_dim)


@caught("state_bytes", "H=3, after 34 positions the state holds .* bytes, by state_bytes")
class FormulaOfWholeBlocks(Softmax):
    """Right at multiples of 64 only."""

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(-(-length // 64) * 64)


@caught("state_bytes", "after 37 positions of the context and three steps the state holds")
class HoardsWhileStepping(Softmax):
    """In cross-attention the state should stand still, and grows with every step."""

    def step(self, x, state):
        output, new = super().step(x, state)
        spare = {"spare": torch.zeros(1, new.position + 1 + len(getattr(state, "more", {})))}
        return output, Hoard(k=new.k, v=new.v, mask=new.mask, position=new.position, more=spare)


@caught("state_bytes", "views keep .* bytes alive behind ", window=4)
class WindowAsView(SlidingWindow):
    """A slice of the cache keeps all of it alive."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        cache = Softmax.update(self, state, k, v, **keywords)
        return dataclasses.replace(cache, k=cache.k[:, -self.window :], v=cache.v[:, -self.window :])
