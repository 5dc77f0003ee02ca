"""Who reads whom: nothing of the future, and all of what the pattern promises.

Look-ahead is tested by substitution, never by gradients: sorting and top-k leak the future without a gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attentions.base import Attention, LayerSpec, Pattern, QKVAttention
from bench.contract.comparing import (
    EXACT,
    FORMS,
    ContractError,
    NotApplicable,
    require_different,
    require_equal,
    require_finite,
)
from bench.contract.layers import (
    BATCH,
    CONTEXT,
    LENGTH,
    LONG,
    Factory,
    build,
    inputs,
    intercepted,
    mixes,
    replaced,
    run_layer,
)


def check_no_look_ahead(factory: Factory, spec: LayerSpec) -> None:
    """No output moves when every later input is replaced or cut off, in train and in eval mode; or it is said to."""
    module = build(factory, spec)
    try:
        _look_ahead(module, spec)
    except ContractError:
        if module.leaks is None:
            raise
        raise NotApplicable(f"it looks ahead, as declared: {module.leaks}") from None
    if module.leaks is not None:
        raise ContractError(f"declared to look ahead, yet no output does: {module.leaks}")


def _look_ahead(module: Attention, spec: LayerSpec) -> None:
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


def check_mixing(factory: Factory, spec: LayerSpec) -> None:
    """Outputs depend on the past (noncausal: also on the future; cross: on the context), values included."""
    module = build(factory, spec)
    *queries, source = inputs(spec)
    base = run_layer(module, *queries, source)
    half = LENGTH // 2
    cut = CONTEXT // 2 if spec.cross else half
    sides = {"earlier": slice(0, cut), "later": slice(cut, None)}
    if spec.pattern == Pattern.CAUSAL_SELF:
        del sides["later"]
    for side, where in sides.items():
        reading = slice(None) if spec.cross else slice(half, None) if side == "earlier" else slice(0, half)
        expected = base[:, reading]
        words = f"{side} {'context' if spec.cross else 'inputs'}"
        output = run_layer(module, *queries, replaced(source, where))[:, reading]
        if not mixes(module):
            require_equal(output, expected, f'declared as paper = "control", but {words} matter', EXACT)
            continue
        require_different(output, expected, f"outputs ignore all {words}; a control says so: paper = 'control'")
        if isinstance(module, QKVAttention):
            with intercepted(module, other_values=where) as heads:
                output = run_layer(module, *queries, source)[:, reading]
            if heads:
                what = f"outputs ignore the values of all {words}: nothing is summed up"
                require_different(output, expected, what)


def check_grid(factory: Factory, spec: LayerSpec) -> None:
    """On an image of 5 x 7 positions, read row by row: what holds on a line holds here."""
    spec = replace(spec, grid=(5, 7), max_length=35)
    module = build(factory, spec)
    *queries, source = inputs(spec, length=35)
    base = run_layer(module, *queries, source)
    if base.shape != (BATCH, 35, spec.dim):
        raise ContractError(f"[B, 35, M] became {list(base.shape)}")
    require_finite(base, "output")
    if spec.causal and module.leaks is None:
        x, *context = *queries, source
        for t in (0, 5, 6, 7, 17, 33):
            output = run_layer(module, replaced(x, slice(t + 1, None)), *context)
            require_equal(
                output[:, : t + 1], base[:, : t + 1], f"inputs after {t} replaced: an output up to {t}", EXACT
            )
    mask = torch.arange(source.shape[1]).expand(BATCH, -1) % 5 < torch.tensor([[3], [4]])
    clean = run_layer(module, *queries, source, key_mask=mask)
    dirty = run_layer(module, *queries, source.masked_fill(~mask[..., None], 2.0), key_mask=mask)
    if not spec.cross:  # what a masked position gives is nobody's business
        dirty, clean = (output.masked_fill(~mask[..., None], 0.0) for output in (dirty, clean))
    require_equal(dirty, clean, "masked keys replaced: an unmasked output", EXACT)
