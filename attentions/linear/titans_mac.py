"""Titans MAC: memory as context."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from attentions.base import Attention, Factory, LayerSpec, Pattern, State
from attentions.dense.softmax import Softmax
from attentions.linear._neural_memory import MemoryGate
from attentions.linear._recurrence import masked
from attentions.linear.titans_lmm import LMMState, TitansLMM


@dataclass(kw_only=True)
class MACState(State):
    """The memory, what the attention carries since the segment began (cross: nothing), and the latest inputs."""

    memory: LMMState
    attending: State | None
    tail: Tensor


class MemoryAsContext(Attention):
    """A segment attends to what a long-term memory answers to it, to itself, and to a few learned tokens.

    For each segment S of `segment` positions, in order, with the memory M that earlier segments left: h = M(S W_Q); y =
    attention over [P; h; S], in which position i sees P and h and S up to i; the output is y gated by M(y); then M
    learns y. What attends is p_1 .. p_P, h_1, s_1, h_2, s_2, .., so any causal mechanism can do it. The memory is that
    of `TitansLMM` with a chunk of one segment.

    Noncausal: attention sees the whole segment, and segments are taken from either end with the same weights and
    averaged. Cross: the memory learns from the context, once; each query attends to P, to what the memory answers
    it and to itself.

    Args:
        mixer: the attention over [P; h; S]: any mechanism with the slot's pattern of self-attention; None: softmax.
        segment: positions of a segment.
        num_persistent: learned tokens P, before every segment.
        depth, momentum, conv_size: of the memory, see `TitansLMM`.

    Source: Behrouz et al. 2024, https://arxiv.org/abs/2501.00663, section 4.1, eq. 21 to 25 and figure 3a. Differs: two
    things printed there let a position see later ones, see `MemoryAsContextOfficial`: eq. 25 gates with the memory that
    has learned the whole segment, here with that of earlier segments; eq. 22 has all of h before S, here h_i, which s_i
    asks for, stands before s_i. The gate is that of section 4.2, see `MemoryGate`. The NeurIPS 2025 version (appendix
    E.1) has segments of 512, P = 128, 256 memory tokens h and chunks of 16; here h is one for each position and a chunk
    is a segment. Noncausal and cross forms are ours.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2501.00663"
    complexity = "T (segment + num_persistent)"
    looks_ahead: ClassVar[bool] = False

    def __init__(
        self,
        spec: LayerSpec,
        *,
        mixer: Factory | None = None,
        segment: int = 16,
        num_persistent: int = 4,
        depth: int = 1,
        momentum: bool = True,
        conv_size: int = 4,
    ):
        super().__init__(spec)
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        if num_persistent < 0:
            raise ValueError(f"num_persistent must be at least 0, got {num_persistent}")
        self.segment = segment
        self.memory = TitansLMM(
            replace(spec, causal=True), depth=depth, momentum=momentum, chunk_size=segment, conv_size=conv_size
        )
        length = num_persistent + 2 * (1 if spec.cross else segment)
        self.mixer = (mixer or Softmax)(replace(spec, cross=False, context_length=None, grid=None, max_length=length))
        self.persistent = nn.Parameter(torch.randn(num_persistent, spec.dim))
        self.gate = MemoryGate(spec.dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        self._source(x, context)
        if context is not None:
            memory = self.memory.init_state(x.shape[0], context, key_mask=key_mask)
            y = self._attend_alone(x, self.memory.merge(x, self.memory.read(self.memory.query(x), memory)))
            return self.gate(y, self.memory.merge(y, self.memory.read(self.memory.query(y), memory)))
        x = masked(x, key_mask)
        output = self._segments(x, key_mask)
        if not self.spec.causal:
            mask = None if key_mask is None else key_mask.flip(1)
            output = (output + self._segments(x.flip(1), mask).flip(1)) / 2
        return output

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> MACState:
        memory = self.memory.init_state(batch_size, context, key_mask=key_mask)
        return MACState(memory=memory, attending=self._begun(batch_size), tail=memory.tail.clone())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, MACState)
        memory, position = state.memory, state.position + 1
        earlier = memory if self.spec.cross else dataclasses.replace(memory, weights=memory.start)
        q = self.memory.query(x, state.position, state.tail)
        h = self.memory.merge(x, self.memory.read(q, earlier))
        if state.attending is None:
            y, attending = self._attend_alone(x, h), None
        else:
            _, attending = self.mixer.step(h, state.attending)
            y, attending = self.mixer.step(x, attending)
            attending = attending if position % self.segment else self._begun(x.shape[0])
        asked, memory = self.memory.advance(y, memory)
        output = self.gate(y, self.memory.merge(y, self.memory.read(asked, earlier)))
        tail = torch.cat([state.tail, x], 1)[:, 1:].clone()  # clone: a view would keep all inputs alive
        return output, MACState(memory=memory, attending=attending, tail=tail, position=position)

    def state_bytes(self, length: int) -> int:
        memory, tail = self.memory.state_bytes(length), self.memory.query_conv.kernel_size - 1
        inner = 0 if self.spec.cross else self.mixer.state_bytes(len(self.persistent) + 2 * (length % self.segment))
        return memory + inner + 4 * tail * self.spec.dim

    def _segments(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        memory, queries = self.memory.init_memory(x.shape[0], x), self.memory.query(x)
        attended, answers = [], []
        for first in range(0, x.shape[1], self.segment):
            piece = slice(first, first + self.segment)
            seen = None if key_mask is None else key_mask[:, piece]
            h = self.memory.merge(x[:, piece], self.memory.read(queries[:, piece], memory))
            y = masked(self._attend(x[:, piece], h, seen), seen)
            asked, learned = self.memory.advance(y, memory, key_mask=seen)
            answers.append(self.memory.read(asked, learned if self.looks_ahead else memory))
            attended.append(y)
            memory = learned
        y = torch.cat(attended, 1)
        return self.gate(y, self.memory.merge(y, torch.cat(answers, 1)))

    def _attend(self, x: Tensor, h: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """y [B, C, M] at the positions x [B, C, M] of a segment, to which the memory answers h [B, C, M]."""
        pairs, persistent = torch.stack([h, x], 2).flatten(1, 2), self._persistent(x.shape[0])
        if key_mask is not None:
            learned = key_mask.new_ones(persistent.shape[:2])
            key_mask = torch.cat([learned, key_mask.repeat_interleave(2, 1)], 1)
        return self.mixer(torch.cat([persistent, pairs], 1), key_mask=key_mask)[:, persistent.shape[1] + 1 :: 2]

    def _attend_alone(self, x: Tensor, h: Tensor) -> Tensor:
        """y where every position is a segment."""
        return self._attend(x.flatten(0, 1)[:, None], h.flatten(0, 1)[:, None]).view(x.shape)

    def _persistent(self, batch_size: int) -> Tensor:
        return self.persistent.expand(batch_size, -1, -1)

    def _begun(self, batch_size: int) -> State | None:
        """What the attention carries at the start of a segment."""
        if self.spec.cross:
            return None
        if not len(self.persistent):
            return self.mixer.init_state(batch_size)
        return self.mixer.prefill(self._persistent(batch_size))[1]


class MemoryAsContextOfficial(MemoryAsContext):
    """MAC as printed: all of h stands before a segment, and the gate asks the memory that has learned all of it.

    Source: Behrouz et al. 2024, https://arxiv.org/abs/2501.00663, eq. 22 and 25. Otherwise as `MemoryAsContext`.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "its memory learns the context alone, so eq. 25 and its strict form agree"}
    leaks = (
        "a position attends to what the memory answers later ones of its segment, and is gated with what it has learned"
    )
    stepwise = "what a position attends to and what gates it exist only once the segment is over"
    looks_ahead = True

    def _attend(self, x: Tensor, h: Tensor, key_mask: Tensor | None = None) -> Tensor:
        persistent = self._persistent(x.shape[0])
        if key_mask is not None:
            key_mask = torch.cat([key_mask.new_ones(persistent.shape[:2]), key_mask, key_mask], 1)
        return self.mixer(torch.cat([persistent, h, x], 1), key_mask=key_mask)[:, -x.shape[1] :]
