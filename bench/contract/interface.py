"""The mechanism as others meet it: its YAML, patterns, shapes, state dict, seed and dropout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import get_object

from attentions.base import Attention, LayerSpec, UnsupportedPattern
from bench import source
from bench.contract.comparing import (
    EXACT,
    ContractError,
    NotApplicable,
    require_different,
    require_equal,
    require_finite,
    require_finite_gradients,
)
from bench.contract.layers import (
    CONTEXT,
    HEADS,
    Factory,
    build,
    constructor,
    declared,
    inputs,
    noise,
    run_layer,
    slot,
    slots,
    unbuildable,
)


def check_yaml_keys(factory: Factory, config: Mapping[str, Any] | None, plugins: Sequence[str]) -> None:
    """The YAML's keys are the constructor's keywords: none stale, none hidden."""
    if config is None:
        raise NotApplicable("no YAML was given")
    for name, part in _parts(config):
        try:
            source.resolve(name, plugins)
        except source.UserError as error:
            raise ContractError(str(error)) from error
        if part.get("_partial_") is not True:
            raise ContractError(f"{name} needs _partial_: true beside it")
        keywords = own_keywords(get_object(name))
        given = {str(key) for key in part if not str(key).startswith("_")}
        if stale := sorted(given - keywords):
            raise ContractError(
                f"{name} has no keyword {', '.join(stale)}; it has: {', '.join(sorted(keywords)) or 'none'}"
            )
        if hidden := sorted(keywords - given):
            raise ContractError(f"{name} has keywords that its YAML hides: {', '.join(hidden)}")


def _parts(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield str(config["_target_"]), config
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from _parts(value)


def own_keywords(target: Callable[..., Any]) -> set[str]:
    """Keywords of a constructor; what a class without one inherits from `attentions.base` is not its own."""
    function: Callable[..., Any] = target
    if isinstance(target, type):
        function = next(vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls))
        if function.__module__ == Attention.__module__:
            return set()
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        raise ContractError(
            f"{target.__name__} takes *args or **kwargs; its hyper-parameters must be keywords of their own"
        )
    return {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}


def check_patterns(factory: Factory, config: Any, plugins: Sequence[str]) -> None:
    """Declared patterns run and give [B, T, M] in the dtype of x; others are refused at construction."""
    patterns = declared(factory)
    if not patterns:
        raise ContractError("it is defined for no pattern at all")
    for pattern in ~patterns if constructor(factory) else ():  # a function's patterns are what it did not refuse
        if not unbuildable(factory, slot(pattern), UnsupportedPattern):
            raise ContractError(f"{pattern.names()[0]} is not declared, yet not refused with UnsupportedPattern")
    for label, spec in slots(factory).items():
        if reason := unbuildable(factory, spec):
            raise ContractError(f"{label} is declared, but no layer can be built: {reason}")
        for dtype in (torch.float32, torch.float64):
            x, *context = inputs(spec, dtype=dtype)
            output = build(factory, spec, dtype=dtype)(x, *context)
            if output.shape != x.shape or output.dtype != dtype:
                raise ContractError(f"{label}: {list(x.shape)} {dtype} became {list(output.shape)} {output.dtype}")


def check_shapes(factory: Factory, spec: LayerSpec) -> None:
    """Lengths 1, 37, 64 and 100, batches of 1 and 2, grouped heads: finite outputs and gradients in float32."""
    for heads, kv_heads in ((HEADS, HEADS), (6, 2), (1, 1)):
        grouped = replace(spec, num_heads=heads, num_kv_heads=kv_heads)
        module = build(factory, grouped, dtype=torch.float32).train()
        for length, batch in ((1, 1), (1, 2), (37, 1), (64, 2), (100, 2)):
            queries, keys = (length, CONTEXT), (CONTEXT, length)
            for query_length, key_length in (queries, keys) if spec.cross else ((length, length),):
                x = noise(batch, query_length, spec.dim, seed=1, dtype=torch.float32).requires_grad_()
                context = [noise(batch, key_length, spec.dim, seed=2, dtype=torch.float32)] if spec.cross else []
                what = f"B={batch}, T={query_length}, S={key_length}, H={heads}, G={kv_heads}"
                output = module(x, *context)
                if output.shape != x.shape:
                    raise ContractError(f"{what}: {list(x.shape)} became {list(output.shape)}")
                require_finite(output, f"{what}: output")
                require_finite_gradients(output, x, module, what)


def check_same_seed(factory: Factory, spec: LayerSpec) -> None:
    """One seed gives one layer and one output; evaluation draws no random numbers and changes nothing."""
    first, second = build(factory, spec), build(factory, spec)
    for (name, one), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        if not torch.equal(one, other):
            raise ContractError(f"two constructions under one seed differ in {name}")
    arguments = inputs(spec)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        outputs = []
        for module, seed in ((first, 1), (first, 2), (second, 3)):
            torch.manual_seed(seed)
            outputs.append(module(*arguments))
    require_equal(outputs[1], outputs[0], "a second forward in eval mode", EXACT)
    require_equal(outputs[2], outputs[0], "a layer built again under the same seed", EXACT)
    first.train()
    once, twice = run_layer(first, *arguments), run_layer(first, *arguments)
    require_equal(once, twice, "a second forward under one seed in train mode", EXACT)


def check_state_dict(factory: Factory, spec: LayerSpec) -> None:
    """What the state dict holds is all that the function needs."""
    saved, loaded = build(factory, spec, seed=0), build(factory, spec, seed=1)
    loaded.load_state_dict(saved.state_dict())
    arguments = inputs(spec)
    what = "a layer loaded from another's state dict (random numbers outside of it?)"
    require_equal(run_layer(loaded, *arguments), run_layer(saved, *arguments), what, EXACT)


def check_dropout(factory: Factory, spec: LayerSpec) -> None:
    """Dropout acts in train mode and only there."""
    cls = constructor(factory)
    if cls is None or "dropout" not in own_keywords(cls):
        raise NotApplicable("its constructor has no dropout")
    module, plain = build(factory, spec, dropout=0.5), build(factory, spec, dropout=0.0)
    arguments = inputs(spec)
    output, expected = run_layer(module, *arguments), run_layer(plain, *arguments)
    require_equal(output, expected, "eval mode with dropout=0.5 against dropout=0", EXACT)
    output, expected = run_layer(module.train(), *arguments), run_layer(plain.train(), *arguments)
    require_different(output, expected, "dropout=0.5 changes nothing in train mode")
