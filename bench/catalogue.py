"""What each mechanism is and costs, measured on one layer of it: the columns of `python -m bench.list attentions`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from attentions.base import Attention, LayerSpec, Pattern, Unsupported

DIM, NUM_HEADS, MAX_LENGTH = 128, 4, 1024
LENGTHS = (128, 1024)  # positions after which the decode state is measured
LAYERS = 6  # a hybrid is measured as the mean over this depth, which its alternation divides
ALLOWED = 1.10  # parameters over softmax's: above it a comparison at equal width is not one at equal size
PREFERRED = Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS, Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS
CONDITIONS = (
    f"one layer of width {DIM} with {NUM_HEADS} heads and max_length {MAX_LENGTH}, float32; "
    "parameters over softmax attention's; state of one sequence"
)


@dataclass(frozen=True)
class Entry:
    """Measured on one layer.

    Args:
        parameters: over those of softmax attention in the same slot.
        state_bytes: of one sequence at each of LENGTHS; None where it does not decode.
        complexity: as declared by the class; runs_on: what it needs.
    """

    parameters: float
    state_bytes: tuple[int, ...] | None
    complexity: str
    runs_on: str


def measure(factory: Callable[[LayerSpec], Attention], softmax: Callable[[LayerSpec], Attention]) -> Entry:
    """Build a mechanism in its first possible slot (causal self, causal cross, noncausal self, noncausal cross)."""
    layers, references = _layers(factory, softmax)
    sizes = [sum(_count(layer) for layer in group) for group in (layers, references)]
    kinds = list({type(layer): layer for layer in layers}.values())
    needs = sorted({layer.requires for layer in kinds if layer.requires})
    return Entry(
        parameters=sizes[0] / sizes[1],
        state_bytes=_states(layers),
        complexity=" + ".join(dict.fromkeys(layer.complexity for layer in kinds)),
        runs_on="CPU, GPU" if not needs else ", ".join(needs),
    )


def _layers(factory: Callable[[LayerSpec], Attention], softmax: Callable[[LayerSpec], Attention]) -> Any:
    """Layers of a mechanism and of softmax attention in the same slots."""
    refused: Unsupported | None = None
    for pattern in PREFERRED:
        spec = LayerSpec(
            causal=pattern in Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS,
            cross=pattern in Pattern.CROSS,
            num_layers=LAYERS,
            dim=DIM,
            num_heads=NUM_HEADS,
            max_length=MAX_LENGTH,
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                specs = [replace(spec, layer=index) for index in range(LAYERS)]
                # a class makes every layer alike, or nearly so; a function such as `hybrid` alternates
                specs = specs[:1] if isinstance(getattr(factory, "func", factory), type) else specs
                return [factory(s) for s in specs], [softmax(s) for s in specs]
        except Unsupported as error:
            refused = error
    raise refused or Unsupported("it is defined for no pattern")


def _count(layer: Attention) -> int:
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)


@torch.no_grad()
def _states(layers: list[Attention]) -> tuple[int, ...] | None:
    """Mean bytes over the layers of one sequence's state at each length."""
    totals = []
    for length in LENGTHS:
        total = 0
        for layer in layers:
            source = torch.randn(1, length, layer.spec.dim, generator=torch.Generator().manual_seed(0))
            try:
                if layer.spec.cross:
                    total += layer.eval().init_state(1, source).nbytes
                else:
                    total += layer.eval().prefill(source)[1].nbytes
            except Unsupported:
                return None
        totals.append(total // len(layers))
    return tuple(totals)
