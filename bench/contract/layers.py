"""What checks are made of: slots, layers with random weights, inputs, and ways to run and to overhear a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attentions.base import Attention, LayerSpec, Pattern, QKVAttention, UnsupportedPattern

Factory = Callable[..., Attention]

# no two sizes are equal, so a swapped axis cannot pass; head widths stay even, for rotary pairs and halved keys
BATCH, HEADS, DIM = 2, 3, 36
LENGTH, CONTEXT = 37, 23
LONG = 131  # more than one chunk of any mechanism, and a ragged end
LAYERS = 6  # a hybrid repeats within this depth


def constructor(factory: Factory) -> type[Attention] | None:
    """The class behind a factory, or None for a function such as `hybrid`."""
    target: Any = factory
    while isinstance(target, functools.partial):
        target = target.func
    return target if isinstance(target, type) and issubclass(target, Attention) else None


def declared(factory: Factory) -> Pattern:
    """A class says its patterns; a function has those that none of its layers refuses."""
    if (cls := constructor(factory)) is not None:
        return cls.patterns
    found = Pattern(0)
    for pattern in Pattern.ALL:
        if not any(unbuildable(factory, slot(pattern, layer), UnsupportedPattern) for layer in range(LAYERS)):
            found |= pattern
    return found


def unbuildable(factory: Factory, spec: LayerSpec, kind: type[Exception] = Exception) -> str:
    """Why the constructor refuses this slot with an error of this kind; empty when it does not."""
    try:
        build(factory, spec)
    except Exception as error:
        return f"{type(error).__name__}: {error}" if isinstance(error, kind) else ""
    return ""


def slot(pattern: Pattern, layer: int = 0) -> LayerSpec:
    """The slot that checks start from."""
    return LayerSpec(
        dim=DIM,
        num_heads=HEADS,
        causal=pattern in Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS,
        cross=pattern in Pattern.CROSS,
        max_length=1024,
        layer=layer,
        num_layers=LAYERS,
    )


def slots(factory: Factory) -> dict[str, LayerSpec]:
    """A slot per declared pattern and, for a function, per kind of layer that it makes."""
    found = {}
    for pattern in declared(factory):
        kinds: dict[str, LayerSpec] = {}
        for spec in [slot(pattern, layer) for layer in range(1 if constructor(factory) else LAYERS)]:
            kinds.setdefault(unbuildable(factory, spec) or _kind(build(factory, spec)), spec)
        for spec in kinds.values():
            found[pattern.names()[0] + (f", layer {spec.layer}" if len(kinds) > 1 else "")] = spec
    return found


def _kind(module: Attention) -> str:
    """Class, shapes and settings of a layer: equal for the layers that a hybrid makes alike."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
    return f"{type(module)} {shapes} {settings}"


def build(
    factory: Factory, spec: LayerSpec, *, seed: int = 0, dtype: torch.dtype = torch.float64, **keywords: Any
) -> Attention:
    """A layer in eval mode whose every parameter is random: a gate that starts at zero would hide what is behind it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = factory(spec, **keywords)
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.to(dtype).eval()


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the arguments alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    spec: LayerSpec, length: int = LENGTH, batch: int = BATCH, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """(x,), or (x, context) in cross-attention: keys and values come from the last."""
    x = noise(batch, length, spec.dim, seed=1, dtype=dtype)
    return (x, noise(batch, CONTEXT, spec.dim, seed=2, dtype=dtype)) if spec.cross else (x,)


def replaced(x: Tensor, where: Tensor | slice, scale: float = 3.0) -> Tensor:
    """x [B, T, M] with noise at some positions, louder than x so that maxima and rankings change."""
    x = x.clone()
    x[:, where] = scale * noise(*x.shape, seed=3, dtype=x.dtype)[:, where]
    return x


def run_layer(module: Attention, *arguments: Tensor, **keywords: Any) -> Tensor:
    """A forward without gradient that leaves no trace: random numbers start from one seed, buffers are put back."""
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        output = module(*arguments, **keywords)
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return output


@contextmanager
def intercepted(module: QKVAttention, other_values: slice | None = None) -> Iterator[list[Tensor]]:
    """Collect what `attend` returns [B, T, H, V], optionally with noise for the values of some positions."""
    attend, heads = module.attend, []

    def listen(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        heads.append(attend(q, k, v if other_values is None else replaced(v, other_values), **keywords))
        return heads[-1]

    module.attend = listen  # type: ignore[method-assign]
    try:
        yield heads
    finally:
        del module.attend


def mixes(module: Attention) -> bool:
    """Whether the layer is to move information between positions; a class with `paper = "control"` says it does not."""
    return module.paper != "control"
