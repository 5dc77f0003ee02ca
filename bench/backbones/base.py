"""What every backbone is: a network built from a task's spec and a factory of attention layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attentions.base import Attention, Factory, LayerSpec, Pattern, State, UnsupportedPattern
from bench.backbones.initialise import initialise, stream
from tasks.base import TaskSpec


@dataclass(kw_only=True)
class DecodeState(State):
    """States of all layers of a stack."""

    layers: tuple[State, ...]


class Backbone(nn.Module, ABC):
    """Inputs [B, L], and a context [B, S] where the task has one, to logits [B, P, C] at the labelled positions.

    Class attributes:
        slots: name -> pattern of every place where the mechanism under test can stand; with several, the keyword
            `slot` says which one it fills.

    Attributes:
        num_layers: depth; initialisation: see `bench.backbones.initialise`.
    """

    slots: ClassVar[dict[str, Pattern]]
    num_layers: int
    initialisation: str

    @abstractmethod
    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits at `positions` [B, P], or everywhere when None; one per sequence where the task asks for that.

        Masks are True at real tokens of the inputs and of the context.
        """

    def init_state(self, batch_size: int, context: Tensor | None = None) -> DecodeState:
        """The decode state before the first token."""
        raise UnsupportedPattern(f"backbone {type(self).__name__} is noncausal and does not decode")

    def step(self, inputs: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """One token [B, 1] -> logits [B, 1, C] and the next state."""
        raise UnsupportedPattern(f"backbone {type(self).__name__} is noncausal and does not decode")

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def pattern_of(backbone: Callable[..., Backbone]) -> str | None:
    """The pattern of the slot under test, such as "causal self", of a backbone class with its keywords; or None."""
    slots = getattr(getattr(backbone, "func", backbone), "slots", {})
    slot = getattr(backbone, "keywords", {}).get("slot", next(iter(slots)) if len(slots) == 1 else None)
    return slots[slot].names()[0] if slot in slots else None


def build(backbone: Callable[[TaskSpec, Factory], Backbone], spec: TaskSpec, attention: Factory, seed: int) -> Backbone:
    """A backbone whose weights follow from `seed` alone: equal names and shapes get equal values in every model.

    The mechanism's own parameters are drawn by its constructor, layer by layer from (seed, layer); those that the
    backbone initialises, by `initialise`. So the embedding of two rows of a leaderboard is the same.
    """

    def seeded(layer_spec: LayerSpec) -> Attention:
        with torch.random.fork_rng(devices=[]):  # what it draws must not move what the backbone draws
            torch.manual_seed(stream(seed, f"layer {layer_spec.layer}"))
            return attention(layer_spec)

    torch.manual_seed(stream(seed, "backbone"))
    model = backbone(spec, seeded)
    initialise(model, model.initialisation, model.num_layers, seed)
    torch.manual_seed(stream(seed, "dropout"))
    return model
