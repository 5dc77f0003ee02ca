"""Decoding: a step per position is the layer itself, and the state is passed, kept apart and counted in full."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attentions.base import Attention, LayerSpec, State, UnsupportedPattern
from bench.contract.comparing import EXACT, FORMS, ContractError, NotApplicable, require_equal
from bench.contract.layers import BATCH, CONTEXT, LENGTH, LONG, Factory, build, inputs, noise, replaced, run_layer


def started(module: Attention, batch: int, *context: Tensor, **keywords: Any) -> State:
    """`init_state` of a causal layer, which must have one."""
    if module.stepwise is not None:
        raise NotApplicable(f"decoding differs from training by design: {module.stepwise}")
    try:
        return module.init_state(batch, *context, **keywords)
    except UnsupportedPattern as error:
        raise ContractError(f"{error}; write init_state and step, or say why not in stepwise = '...'") from error


def decode(module: Attention, x: Tensor, state: State) -> tuple[Tensor, State]:
    """One `step` per position of x [B, T, M]."""
    outputs = []
    for t in range(x.shape[1]):
        output, state = module.step(x[:, t : t + 1], state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def variants(factory: Factory, spec: LayerSpec) -> Iterator[tuple[Attention, str, int, dict[str, Tensor]]]:
    """Layers to decode with, what is special about them, a length and a mask of the context."""
    yield build(factory, spec), "", LENGTH, {}
    if spec.cross:
        mask = torch.arange(CONTEXT).expand(BATCH, -1) % 5 < torch.tensor([[3], [4]])
        yield build(factory, spec), "masked context, ", LENGTH, {"key_mask": mask}
    else:
        yield build(factory, replace(spec, rotary_base=10000.0)), "rotary positions, ", LENGTH, {}
        yield build(factory, replace(spec, num_heads=6, num_kv_heads=2)), "grouped heads, ", LENGTH, {}
        yield build(factory, spec), "", LONG, {}


def leaves(value: Any, path: str = "state") -> Iterator[tuple[str, Any]]:
    """Everything a state holds, by name: tensors and plain values."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


@torch.no_grad()
def check_step_by_step(factory: Factory, spec: LayerSpec) -> None:
    """Decoding position by position equals all positions at once."""
    for module, words, length, mask in variants(factory, spec):
        x, *context = inputs(spec, length)
        output, _ = decode(module, x, started(module, BATCH, *context, **mask))
        require_equal(output, run_layer(module, x, *context, **mask), f"{words}T={length}, step against forward", FORMS)


@torch.no_grad()
def check_prefill(factory: Factory, spec: LayerSpec) -> None:
    """Prefill gives the outputs of forward and a state that decoding goes on from."""
    for module, words, length, mask in variants(factory, spec):
        x, *context = inputs(spec, length)
        expected = run_layer(module, x, *context, **mask)
        started(module, BATCH, *context)
        for cut in (1, length // 2) if length == LENGTH else (length - 20,):
            what = f"{words}prompt of {cut}"
            output, state = module.prefill(x[:, :cut], *context, **mask)
            require_equal(output, expected[:, :cut], f"{what}: prefill against forward", FORMS)
            output, _ = decode(module, x[:, cut:], state)
            require_equal(output, expected[:, cut:], f"{what}: steps after prefill against forward", FORMS)


@torch.no_grad()
def check_state_apart(factory: Factory, spec: LayerSpec) -> None:
    """A step leaves the state it was given as it was, and two decodes side by side do not meet."""
    module = build(factory, spec)
    x, *context = inputs(spec, length=11)
    expected = run_layer(module, x, *context)
    for label, make in {
        "steps": lambda: decode(module, x[:, :5], started(module, BATCH, *context))[1],
        "prefill": lambda: module.prefill(x[:, :5], *context)[1],
    }.items():
        state = make()
        before = copy.deepcopy(state)
        once, after = module.step(x[:, 5:6], state)
        module.step(replaced(x, slice(5, 6))[:, 5:6], state)
        for (path, now), (_, then) in zip(leaves(state), leaves(before), strict=True):
            if not (torch.equal(now, then) if isinstance(now, Tensor) else now == then):
                raise ContractError(f"step changes the state it was given (after {label}): {path}")
        require_equal(module.step(x[:, 5:6], state)[0], once, f"the same state passed twice, after {label}", EXACT)
        rest, _ = decode(module, x[:, 6:], after)
        require_equal(rest, expected[:, 6:], f"one of two branches of a state, after {label}", FORMS)
    rows = [[part[row : row + 1] for part in (x, *context)] for row in range(BATCH)]
    states = [started(module, 1, *row[1:]) for row in rows]
    for t in range(x.shape[1]):
        for row in range(BATCH):
            output, states[row] = module.step(rows[row][0][:, t : t + 1], states[row])
            what = f"two decodes side by side, row {row}, step {t}"
            require_equal(output, expected[row : row + 1, t : t + 1], what, FORMS)


@torch.no_grad()
def check_state_bytes(factory: Factory, spec: LayerSpec) -> str:
    """`State.nbytes` counts every tensor held and equals the declared formula, and no view keeps the past alive."""
    grouped = replace(spec, num_heads=6, num_kv_heads=2)
    rotary = spec if spec.cross else replace(spec, rotary_base=10000.0)
    reported = {}
    for variant, lengths in ((spec, (37, 131, 64, 512)), (grouped, (37,)), (rotary, (37,))):
        module = build(factory, variant, dtype=torch.float32)
        hidden = []
        for length in lengths:
            source = noise(1, length, spec.dim, seed=2, dtype=torch.float32)
            if spec.cross:
                x = noise(1, 5, spec.dim, seed=1, dtype=torch.float32)
                started(module, 1, source)
                _, state = module.prefill(x[:, :2], source)
                _, after = decode(module, x[:, 2:], state)
                states = {f"{length} positions": state, f"{length} positions of the context and three steps": after}
                expected = dict.fromkeys(states, module.state_bytes(length))
            else:
                started(module, 1)
                _, state = module.prefill(source[:, :-3])
                _, after = decode(module, source[:, -3:], state)
                states = {f"{length - 3} positions": state, f"{length} positions": after}
                expected = {f"{size} positions": module.state_bytes(size) for size in (length - 3, length)}
            for words, held in states.items():
                _require_counted(held, expected[words], f"H={variant.num_heads}, after {words}")
            hidden.append(_hidden_bytes(state))
            reported[length] = after.nbytes
        if hidden[-1] > max(hidden[:-1], default=hidden[-1]):
            raise ContractError(
                f"views keep {hidden[-1]} bytes alive behind {after.nbytes} reported at {lengths[-1]} positions: clone"
            )
    return f"{reported[64]} bytes at 64 positions, {reported[512]} at 512"


def _tensors(state: State) -> list[Tensor]:
    return [value for _, value in leaves(state) if isinstance(value, Tensor)]


def _require_counted(state: Any, declared: int, what: str) -> None:
    """Raises ContractError unless nbytes, the tensors held and the formula agree."""
    if not isinstance(state, State):
        raise ContractError(f"the state is a {type(state).__name__}, not a State")
    if (held := sum(tensor.nbytes for tensor in _tensors(state))) != state.nbytes:
        raise ContractError(f"{what} the state holds {held} bytes and reports {state.nbytes}")
    if declared != state.nbytes:
        raise ContractError(f"{what} the state holds {state.nbytes} bytes, by state_bytes() {declared}")


def _hidden_bytes(state: State) -> int:
    """Bytes of the storages behind a state's tensors that the state does not report."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(state)}
    return sum(storages.values()) - state.nbytes
