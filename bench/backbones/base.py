"""What every backbone is: a network built from a task's spec and a factory of attention layers."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from tasks.base import TaskSpec

Factory = Callable[[LayerSpec], Attention]


@dataclass(kw_only=True)
class DecodeState(State):
    """States of all layers of a stack."""

    layers: tuple[State, ...]


class Backbone(nn.Module, ABC):
    """Inputs [B, L] to logits [B, P, C] at the labelled positions.

    Class attributes:
        slots: name -> pattern of every place where an attention stands.
    """

    slots: ClassVar[dict[str, Pattern]]

    @abstractmethod
    def forward(self, inputs: Tensor, positions: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """Logits at `positions` [B, P], or everywhere when None."""

    @abstractmethod
    def init_state(self, batch_size: int) -> DecodeState:
        """The decode state before the first token."""

    @abstractmethod
    def step(self, inputs: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """One token [B, 1] -> logits [B, 1, C] and the next state."""

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Sums over layers of what the attentions return."""
        total: dict[str, Tensor] = {}
        for module in self.modules():
            if isinstance(module, Attention):
                for name, loss in module.auxiliary_losses().items():
                    total[name] = total[name] + loss if name in total else loss
        return total

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def build(backbone: Callable[[TaskSpec, Factory], Backbone], spec: TaskSpec, attention: Factory, seed: int) -> Backbone:
    """A backbone whose weights follow from `seed` alone: equal names and shapes get equal values in every model.

    The mechanism's own parameters are drawn by its constructor, layer by layer from (seed, layer); those that the
    backbone initialises, by `initialise`. So the embedding of two rows of a leaderboard is the same.
    """

    def seeded(layer_spec: LayerSpec) -> Attention:
        torch.manual_seed(stream(seed, f"layer {layer_spec.layer}"))
        return attention(layer_spec)

    torch.manual_seed(stream(seed, "backbone"))
    model = backbone(spec, seeded)
    if isinstance(model, ScaledInit):
        model.initialise(seed)
    torch.manual_seed(stream(seed, "dropout"))
    return model


def stream(seed: int, purpose: str) -> int:
    """Seed of one stream of random numbers, a stable hash of (seed, purpose)."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


class ScaledInit:
    """Mixin: initial weights by name, from (seed, parameter name).

    `scaled_normal` (GPT-2's, as in Zoology): Linear and Embedding weights N(0, 0.02), biases zero; projections
    back to the residual stream (`out_proj`, `fc2`) N(0, 0.02 / sqrt(2 * layers)). It overwrites Linear layers
    inside a mechanism, as published; what a mechanism keeps outside Linear weights is left alone.
    `native`: everything as its module's constructor made it.
    """

    RESIDUAL: ClassVar[tuple[str, ...]] = ("out_proj", "fc2")
    std: ClassVar[float] = 0.02
    initialisation: str
    num_layers: int

    def initialise(self, seed: int) -> None:
        if self.initialisation == "native":
            return
        assert isinstance(self, nn.Module)
        done: set[int] = set()
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)) or id(module.weight) in done:
                continue
            done.add(id(module.weight))
            scale = 1 / math.sqrt(2 * self.num_layers) if name.rpartition(".")[2] in self.RESIDUAL else 1.0
            generator = torch.Generator().manual_seed(stream(seed, name))
            with torch.no_grad():
                module.weight.normal_(0.0, self.std * scale, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
