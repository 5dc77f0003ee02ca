"""What every mechanism must satisfy, seen from outside: nothing is known of it but `attentions.base`.

A check takes a factory (LayerSpec -> Attention) and a slot, and raises ContractError with one line: what differs,
where, by how much; what it returns is a remark. Where it does not apply it raises NotApplicable with the reason. The
first line of its docstring is its description. All of it runs in float64 unless said otherwise, on the CPU, in seconds.

Look-ahead is tested by substitution, never by gradients: sorting and top-k leak the future without a gradient.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attentions.base import Attention, LayerSpec, Pattern, QKVAttention, State, UnsupportedPattern

Factory = Callable[..., Attention]

# no two sizes are equal, so a swapped axis cannot pass; head widths stay even, for rotary pairs and halved keys
BATCH, HEADS, DIM = 2, 3, 36
LENGTH, CONTEXT = 37, 23
LONG = 131  # more than one chunk of any mechanism, and a ragged end
COUNT = 521  # a bfloat16 sum of ones stands still at 256
LAYERS = 6  # a hybrid repeats within this depth

EXACT = 1e-9  # the same sums over partly other numbers: float64 rounding, nothing else
FORMS = 1e-6  # two forms of one formula in float64; a wrong form is off by more than 1e-3
FLOAT32 = 1e-5  # float32 rounds at 6e-8; two digits for cancellation in long sums
BFLOAT16 = 5e-2  # bfloat16 rounds at 4e-3: a dozen roundings in a row


class ContractError(AssertionError):
    """A mechanism breaks its contract; the message is one line."""


class NotApplicable(Exception):
    """The check has nothing to say about this mechanism; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """One contract. `where`: patterns it is about; None: the mechanism as a whole, once."""

    name: str
    description: str
    function: Callable[..., str | None]
    where: Pattern | None


@dataclass(frozen=True)
class Outcome:
    """What a check found in one slot; `detail` is the error, the reason of a skip, or a remark."""

    attention: str
    check: str
    pattern: str
    status: str  # pass, fail or skip
    detail: str
    seconds: float


CHECKS: dict[str, Check] = {}


def contract(where: Pattern | None) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Enter a function `check_<name>` in the list."""

    def enter(function: Callable[..., str | None]) -> Callable[..., str | None]:
        name = function.__name__.removeprefix("check_")
        CHECKS[name] = Check(name, (function.__doc__ or "").partition("\n")[0], function, where)
        return function

    return enter


def run(
    factory: Factory,
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
    checks: Sequence[str] = (),
) -> list[Outcome]:
    """All checks (or those named in `checks`) in every declared slot.

    Args:
        factory: makes the layer of a slot, such as the class itself or what `_partial_: true` gives.
        name: of the row, for the outcomes.
        config: the row's YAML as a dictionary, for the check of its keys; plugins: packages it may name.
    """
    chosen = [CHECKS[check] for check in checks or CHECKS]
    outcomes = [
        _attempt(check, name, "every pattern", factory, config, plugins) for check in chosen if check.where is None
    ]
    for label, spec in slots(factory).items() if any(check.where for check in chosen) else ():
        here = [check for check in chosen if check.where and spec.pattern in check.where]
        if reason := unbuildable(factory, spec):  # said once, by `patterns`
            outcomes += [Outcome(name, check.name, label, "skip", f"no layer: {reason}", 0.0) for check in here]
        else:
            outcomes += [_attempt(check, name, label, factory, spec) for check in here]
    return outcomes


def _attempt(check: Check, name: str, label: str, *arguments: Any) -> Outcome:
    start = time.perf_counter()
    try:
        status, detail = "pass", check.function(*arguments) or ""
    except NotApplicable as reason:
        status, detail = "skip", str(reason)
    except ContractError as error:
        status, detail = "fail", str(error)
    except Exception as error:  # whatever a mechanism raises is a finding, and the other checks go on
        status, detail = "fail", f"raises {type(error).__name__}: {error}"
    return Outcome(name, check.name, label, status, " ".join(detail.split()), time.perf_counter() - start)


# -- slots and layers -----------------------------------------------------------------------------


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
    layers = range(LAYERS)
    return functools.reduce(
        operator.or_,
        (
            p
            for p in Pattern.ALL
            if not any(unbuildable(factory, slot(p, layer), UnsupportedPattern) for layer in layers)
        ),
        Pattern(0),
    )


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
    """(x,), or (x, context) in cross-attention."""
    x = noise(batch, length, spec.dim, seed=1, dtype=dtype)
    return (x, noise(batch, CONTEXT, spec.dim, seed=2, dtype=dtype)) if spec.cross else (x,)


def run_layer(module: Attention, *arguments: Tensor, **keywords: Any) -> Tensor:
    """A forward without gradient that leaves no trace: random numbers start from one seed, buffers are put back."""
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        output = module(*arguments, **keywords)
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return output


def mixes(module: Attention) -> bool:
    """Whether the layer is to move information between positions; a class with `paper = "control"` says it does not."""
    return module.paper != "control"


# -- comparing ------------------------------------------------------------------------------------


def deviation(got: Tensor, expected: Tensor) -> Tensor:
    """Largest difference at each row and position [B, T], in units of the largest expected value; NaN counts as inf."""
    if got.shape != expected.shape:
        raise ContractError(f"shape {list(got.shape)} instead of {list(expected.shape)}")
    got, expected = got.detach(), expected.detach()
    difference = (got - expected).abs().nan_to_num(nan=torch.inf).flatten(2).amax(-1)
    return difference / expected.abs().max().clamp_min(1e-30)


def require_equal(got: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    """Raises ContractError: "<what>: differs by 3.1e-01 of the largest value, first at row 0, position 5"."""
    size = deviation(got, expected)
    if (wrong := ~(size <= tolerance)).any():
        row, position = min(wrong.nonzero().tolist(), key=lambda index: index[::-1])
        where = f"first at row {row}, position {position}"
        raise ContractError(
            f"{what}: differs by {size.max():.1e} of the largest value, {where} (allowed: {tolerance:.0e})"
        )


def require_different(got: Tensor, expected: Tensor, what: str) -> None:
    """Raises ContractError when the two agree to rounding."""
    if (deviation(got, expected) <= EXACT).all():
        raise ContractError(what)


def require_finite(values: Tensor | None, what: str) -> None:
    """Raises ContractError naming the first position that is not finite."""
    if values is not None and not (finite := values.isfinite()).all():
        raise ContractError(f"{what}: not finite at index {(~finite).nonzero()[0].tolist()}")


def replaced(x: Tensor, where: Tensor | slice, scale: float = 3.0) -> Tensor:
    """x [B, T, M] with noise at some positions, louder than x so that maxima and rankings change."""
    x = x.clone()
    x[:, where] = scale * noise(*x.shape, seed=3, dtype=x.dtype)[:, where]
    return x


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


# -- the contracts --------------------------------------------------------------------------------

CAUSAL = Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS


@contract(None)
def check_yaml_keys(factory: Factory, config: Mapping[str, Any] | None, plugins: Sequence[str] = ()) -> None:
    """The YAML's keys are the constructor's keywords: none stale, none hidden."""
    if config is None:
        raise NotApplicable("no YAML was given")
    from hydra.utils import get_object

    from bench import source

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


@contract(None)
def check_patterns(factory: Factory, config: Any = None, plugins: Sequence[str] = ()) -> None:
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


@contract(CAUSAL)
def check_no_look_ahead(factory: Factory, spec: LayerSpec) -> None:
    """No output moves when every later input is replaced or cut off, in train and in eval mode."""
    module = build(factory, spec)
    plans = [(LENGTH, range(LENGTH - 1)), (64, (0, 15, 31, 47, 62)), (LONG, (0, 31, 63, 64, 66, 127, LONG - 2))]
    if spec.cross:
        plans = [(11, range(10)), (LENGTH, range(LENGTH - 1))]  # fewer and more queries than keys
    for length, positions in plans:
        x, *context = inputs(spec, length)
        for mode in ("train", "eval"):
            module.train(mode == "train")
            base = run_layer(module, x, *context)
            for t in positions:
                output = run_layer(module, replaced(x, slice(t + 1, None)), *context)
                what = f"{mode} mode, T={length}, inputs after {t} replaced: an output up to {t}"
                require_equal(output[:, : t + 1], base[:, : t + 1], what, EXACT)
        for t in positions[:: max(1, len(positions) // 5)]:
            output = run_layer(module, x[:, : t + 1], *context)
            require_equal(output, base[:, : t + 1], f"T={length}, inputs after {t} cut off: an output up to {t}", FORMS)


@contract(Pattern.ALL)
def check_mixing(factory: Factory, spec: LayerSpec) -> None:
    """Outputs depend on the past (noncausal: also on the future; cross: on the context), values included."""
    module = build(factory, spec)
    x, *context = inputs(spec)
    base = run_layer(module, x, *context)
    half = LENGTH // 2
    source, cut = (context[0], CONTEXT // 2) if spec.cross else (x, half)
    sides = {"earlier": slice(0, cut), "later": slice(cut, None)}
    if spec.pattern == Pattern.CAUSAL_SELF:
        del sides["later"]
    for side, where in sides.items():
        reading = slice(None) if spec.cross else slice(half, None) if side == "earlier" else slice(0, half)
        words = f"{side} {'context' if spec.cross else 'inputs'}"
        changed = replaced(source, where)
        output = run_layer(module, *((x, changed) if spec.cross else (changed,)))[:, reading]
        if not mixes(module):
            require_equal(output, base[:, reading], f'declared as paper = "control", but {words} matter', EXACT)
            continue
        require_different(output, base[:, reading], f"outputs ignore all {words}; a control says so: paper = 'control'")
        if isinstance(module, QKVAttention):
            with intercepted(module, other_values=where) as heads:
                output = run_layer(module, x, *context)[:, reading]
            if heads:
                require_different(
                    output, base[:, reading], f"outputs ignore the values of all {words}: nothing is summed up"
                )


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


@contract(CAUSAL)
@torch.no_grad()
def check_step_by_step(factory: Factory, spec: LayerSpec) -> None:
    """Decoding position by position equals all positions at once."""
    for module, words, length, mask in variants(factory, spec):
        x, *context = inputs(spec, length)
        output, _ = decode(module, x, started(module, BATCH, *context, **mask))
        require_equal(output, run_layer(module, x, *context, **mask), f"{words}T={length}, step against forward", FORMS)


@contract(CAUSAL)
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


@contract(CAUSAL)
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


@contract(Pattern.ALL)
def check_key_mask(factory: Factory, spec: LayerSpec) -> None:
    """Masked inputs do not matter, masking does, and a mask of all ones is no mask."""
    module = build(factory, spec)
    x, *context = inputs(spec)
    source = context[0] if spec.cross else x
    length = source.shape[1]
    position = torch.arange(length)
    masks = {
        "left": position >= 7,
        "middle": (position < length // 3) | (position >= length // 3 + 5),
        "right": position < length - 7,
    }
    plain = run_layer(module, x, *context)
    everything = torch.ones(BATCH, length, dtype=torch.bool)
    require_equal(run_layer(module, x, *context, key_mask=everything), plain, "a mask of all ones against none", FORMS)
    require_finite(run_layer(module, x, *context, key_mask=~everything), "every key masked")
    _require_finite_gradients(module, x, context, masks["left"].expand(BATCH, -1))
    names = list(masks)
    for shift in range(len(names)):
        chosen = [names[(row + shift) % len(names)] for row in range(BATCH)]  # each row has a mask of its own
        mask = torch.stack([masks[name] for name in chosen])
        poisoned = torch.where(mask[..., None], source, 100 * noise(*source.shape, seed=4))
        base = run_layer(module, x, *context, key_mask=mask)
        output = run_layer(module, *((x, poisoned) if spec.cross else (poisoned,)), key_mask=mask)
        for row, name in enumerate(chosen):
            kept = slice(None) if spec.cross else mask[row]  # a masked position's own output is nobody's
            require_equal(
                output[row : row + 1, kept], base[row : row + 1, kept], f"inputs masked {name} replaced", EXACT
            )
            require_finite(output, f"inputs masked {name}: output")
            if mixes(module) and not (spec.pattern == Pattern.CAUSAL_SELF and name == "right"):
                ignored = f"a mask on the {name} changes nothing: key_mask is ignored"
                require_different(base[row : row + 1, kept], plain[row : row + 1, kept], ignored)


def _require_finite_gradients(module: Attention, x: Tensor, context: Sequence[Tensor], key_mask: Tensor) -> None:
    """A causal query behind masked keys sees nothing: the softmax of no score has a NaN in its gradient."""
    x = x.clone().requires_grad_()
    output = module(x, *context, key_mask=key_mask)
    if output.requires_grad:
        output.square().sum().backward()
        for name, values in (("x", x), *module.named_parameters()):
            require_finite(values.grad, f"inputs masked left: gradient of {name}")
        module.zero_grad()


@contract(Pattern.ALL)
def check_batch_rows(factory: Factory, spec: LayerSpec) -> None:
    """A row's output does not depend on the other rows, nor on its place in the batch."""
    module = build(factory, spec)
    arguments = inputs(spec, batch=3)
    for mode in ("train", "eval"):
        module.train(mode == "train")
        base = run_layer(module, *arguments)
        for row in range(3):
            others = torch.arange(3) != row
            changed = [torch.where(others[:, None, None], 3 * noise(*part.shape, seed=5), part) for part in arguments]
            what = f"{mode} mode, other rows replaced: row {row}"
            require_equal(run_layer(module, *changed)[row : row + 1], base[row : row + 1], what, EXACT)
    rolled = run_layer(module, *(part.roll(1, dims=0) for part in arguments))
    require_equal(rolled, base.roll(1, dims=0), "rows in another order", FORMS)
    alone = run_layer(module, *(part[:1] for part in arguments))
    require_equal(alone, base[:1], "a row on its own", FORMS)


@contract(Pattern.ALL)
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
                if output.requires_grad:
                    module.zero_grad()
                    output.square().sum().backward()
                    require_finite(x.grad, f"{what}: gradient of x")
                    for name, parameter in module.named_parameters():
                        require_finite(parameter.grad, f"{what}: gradient of {name}")


@contract(Pattern.ALL)
def check_gradients(factory: Factory, spec: LayerSpec) -> None:
    """Every parameter that asks for a gradient gets one."""
    module = build(factory, spec).train()
    output = module(*inputs(spec))
    if any(parameter.requires_grad for parameter in module.parameters()):
        if not output.requires_grad:
            raise ContractError("the output carries no gradient")
        (output.square().sum() + sum(module.auxiliary_losses().values())).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any()):
            raise ContractError(f"parameter {name} gets no gradient")


@contract(Pattern.ALL)
def check_precision(factory: Factory, spec: LayerSpec) -> str:
    """float32 stays close to float64 and bfloat16 to float32; inputs a hundred times larger stay finite."""
    arguments = inputs(spec, COUNT)
    errors = {}
    for low, high, allowed in ((torch.float32, torch.float64, FLOAT32), (torch.bfloat16, torch.float32, BFLOAT16)):
        rounded = build(factory, spec).to(low)
        exact = copy.deepcopy(rounded).to(high)  # the same rounded weights: only the arithmetic differs
        output = run_layer(rounded, *(part.to(low) for part in arguments))
        expected = run_layer(exact, *(part.to(low).to(high) for part in arguments))
        if output.dtype != low:
            raise ContractError(f"x in {low} gives an output in {output.dtype}")
        require_finite(output, f"output in {low}")
        scale = expected.double().norm().clamp_min(1e-30)
        error = errors[low] = float((output.double() - expected.double()).norm() / scale)
        if error > allowed:
            raise ContractError(f"{low} is off by {error:.1e} (root mean square) from {high}; allowed: {allowed:.0e}")
    module = build(factory, spec, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        require_finite(run_layer(module, *(part.float() for part in arguments)), "output under bfloat16 autocast")
    loud = [100 * part.float() for part in arguments]
    output = module(loud[0].requires_grad_(), *loud[1:])
    require_finite(output, "output for inputs of size 100")
    if output.requires_grad:
        output.sum().backward()
        require_finite(loud[0].grad, "gradient for inputs of size 100")
    return f"float32 {errors[torch.float32]:.0e}, bfloat16 {errors[torch.bfloat16]:.0e}"


@contract(Pattern.ALL)
def check_full_budget(factory: Factory, spec: LayerSpec) -> None:
    """With nothing left out (`full_budget`) it is softmax attention: values and gradients."""
    cls = constructor(factory)
    if cls is None or cls.full_budget is None:
        raise NotApplicable("no budget at which it is softmax attention: full_budget is None")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from bench.config import CONF

    softmax = instantiate(OmegaConf.load(CONF / "attention" / "softmax.yaml"))
    variants_ = (
        spec,
        replace(spec, num_heads=6, num_kv_heads=2),
        replace(spec, rotary_base=None if spec.cross else 10000.0),
    )
    for spec in variants_:
        module = build(factory, spec, **cls.full_budget(LENGTH))
        weights = module.state_dict()
        reference = build(softmax, spec, bias="q_proj.bias" in weights)
        missing, _ = reference.load_state_dict(weights, strict=False)
        if missing:
            raise ContractError(f"it lacks the weights of softmax attention: {', '.join(missing)}")
        results = []
        for layer in (module, reference):
            x, *context = inputs(spec)
            output = layer(x.requires_grad_(), *context)
            output.square().sum().backward()
            results.append((output, x.grad))
        slot_words = f"H={spec.num_heads}, G={spec.kv_heads}, rotary={spec.rotary_base}, {cls.full_budget(LENGTH)}"
        for what, got, expected in zip(("output", "gradient"), *results, strict=True):
            require_equal(got, expected, f"{slot_words}: {what} against softmax attention", FORMS)


@contract(Pattern.ALL)
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
    require_equal(
        run_layer(first, *arguments),
        run_layer(first, *arguments),
        "a second forward under one seed in train mode",
        EXACT,
    )


@contract(Pattern.ALL)
def check_state_dict(factory: Factory, spec: LayerSpec) -> None:
    """What the state dict holds is all that the function needs."""
    saved, loaded = build(factory, spec, seed=0), build(factory, spec, seed=1)
    loaded.load_state_dict(saved.state_dict())
    arguments = inputs(spec)
    what = "a layer loaded from another's state dict (random numbers outside of it?)"
    require_equal(run_layer(loaded, *arguments), run_layer(saved, *arguments), what, EXACT)


@contract(Pattern.ALL)
def check_dropout(factory: Factory, spec: LayerSpec) -> None:
    """Dropout acts in train mode and only there."""
    cls = constructor(factory)
    if cls is None or "dropout" not in own_keywords(cls):
        raise NotApplicable("its constructor has no dropout")
    module, plain = build(factory, spec, dropout=0.5), build(factory, spec, dropout=0.0)
    arguments = inputs(spec)
    expected = run_layer(plain, *arguments)
    require_equal(run_layer(module, *arguments), expected, "eval mode with dropout=0.5 against dropout=0", EXACT)
    require_different(
        run_layer(module.train(), *arguments),
        run_layer(plain.train(), *arguments),
        "dropout=0.5 changes nothing in train mode",
    )


@contract(Pattern.ALL)
def check_heads(factory: Factory, spec: LayerSpec) -> None:
    """Heads stay apart: a key-value head reaches the query heads of its group, a query head itself."""
    for heads, kv_heads in ((HEADS, HEADS), (6, 2)):
        module = build(factory, replace(spec, num_heads=heads, num_kv_heads=kv_heads))
        if not isinstance(module, QKVAttention):
            raise NotApplicable("it has no query, key and value heads")
        arguments = inputs(spec)
        with intercepted(module) as seen:
            run_layer(module, *arguments)
        if not seen:
            raise NotApplicable("forward does not go through attend")
        base, shape = seen[0], (BATCH, LENGTH, heads, module.value_dim)
        if base.shape != shape:
            raise ContractError(f"attend gives {list(base.shape)} instead of [B, T, H, V] = {list(shape)}")
        group = heads // kv_heads
        for names, count in ((("k_proj", "v_proj"), kv_heads), (("q_proj",), heads)):
            for head in range(count):
                own = head if names[0] == "k_proj" else head // group
                changed = _changed_heads(module, names, head, count, arguments, base)
                readers = set(range(own * group, (own + 1) * group))
                if changed - readers or (names[0] == "k_proj" and changed != readers):
                    raise ContractError(
                        f"H={heads}, G={kv_heads}: other weights for head {head} of {' and '.join(names)} change "
                        f"heads {sorted(changed)} instead of {sorted(readers)}: a swapped axis or a wrong group?"
                    )
        position = LENGTH // 2
        with torch.no_grad():
            merged = module.merge(arguments[0], replaced(base.flatten(2), slice(position, position + 1)).view(shape))
            plain = module.merge(arguments[0], base)
        elsewhere = torch.arange(LENGTH) != position
        require_equal(merged[:, elsewhere], plain[:, elsewhere], f"merge moves position {position} to others", EXACT)


def _changed_heads(
    module: QKVAttention, names: Sequence[str], head: int, count: int, arguments: tuple[Tensor, ...], base: Tensor
) -> set[int]:
    """Heads of attend's output that move when the rows of one head of some projections are replaced."""
    other = copy.deepcopy(module)
    for name in names:
        weight = other.get_submodule(name).get_parameter("weight").data.unflatten(0, (count, -1))
        weight[head] = noise(*weight.shape[1:], seed=6) * weight.std()
    with intercepted(other) as seen:
        run_layer(other, *arguments)
    moved = (seen[0] - base).abs().amax((0, 1, 3)) > EXACT * base.abs().max()
    return set(moved.nonzero().flatten().tolist())


@contract(CAUSAL)
@torch.no_grad()
def check_state_bytes(factory: Factory, spec: LayerSpec) -> str:
    """`State.nbytes` counts every tensor held, and no view keeps the past alive; remark: float32 bytes per sequence."""
    module = build(factory, spec, dtype=torch.float32)
    reported, hidden = [], []
    for length in (64, 512):
        x, *context = inputs(spec, length, batch=1, dtype=torch.float32)
        started(module, 1, *context)
        _, state = module.prefill(x, *context)
        if not isinstance(state, State):
            raise ContractError(f"the state is a {type(state).__name__}, not a State")
        tensors = [value for _, value in leaves(state) if isinstance(value, Tensor)]
        if (held := sum(tensor.nbytes for tensor in tensors)) != state.nbytes:
            raise ContractError(f"after {length} positions the state holds {held} bytes and reports {state.nbytes}")
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        reported.append(state.nbytes)
        hidden.append(sum(storages.values()) - state.nbytes)
    if hidden[1] > max(0, hidden[0]):
        raise ContractError(
            f"views keep {hidden[1]} bytes alive behind the {reported[1]} reported at 512 positions: clone"
        )
    return f"{reported[0]} bytes at 64 positions, {reported[1]} at 512"
