"""What must not meet: masked inputs, other rows of the batch, other heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, QKVAttention
from bench.contract.comparing import (
    EXACT,
    FORMS,
    ContractError,
    NotApplicable,
    require_different,
    require_equal,
    require_finite,
    require_finite_gradients,
)
from bench.contract.layers import (
    BATCH,
    HEADS,
    LENGTH,
    Factory,
    build,
    inputs,
    intercepted,
    mixes,
    noise,
    replaced,
    run_layer,
)


def check_key_mask(factory: Factory, spec: LayerSpec) -> None:
    """Masked inputs do not matter, masking does, and a mask of all ones is no mask."""
    module = build(factory, spec)
    *queries, source = inputs(spec)
    length = source.shape[1]
    position = torch.arange(length)
    masks = {
        "left": position >= 7,
        "middle": (position < length // 3) | (position >= length // 3 + 5),
        "right": position < length - 7,
    }
    plain = run_layer(module, *queries, source)
    everything = torch.ones(BATCH, length, dtype=torch.bool)
    output = run_layer(module, *queries, source, key_mask=everything)
    require_equal(output, plain, "a mask of all ones against none", FORMS)
    require_finite(run_layer(module, *queries, source, key_mask=~everything), "every key masked")
    # a causal query behind masked keys sees nothing: the softmax of no score has a NaN in its gradient
    x, *context = inputs(spec)
    output = module(x.requires_grad_(), *context, key_mask=masks["left"].expand(BATCH, -1))
    require_finite_gradients(output, x, module, "inputs masked left")
    names = list(masks)
    for shift in range(len(names)):
        chosen = [names[(row + shift) % len(names)] for row in range(BATCH)]  # each row has a mask of its own
        mask = torch.stack([masks[name] for name in chosen])
        poisoned = torch.where(mask[..., None], source, 100 * noise(*source.shape, seed=4))
        base = run_layer(module, *queries, source, key_mask=mask)
        output = run_layer(module, *queries, poisoned, key_mask=mask)
        for row, name in enumerate(chosen):
            kept = slice(None) if spec.cross else mask[row]  # a masked position's own output is nobody's
            got, expected, unmasked = (part[row : row + 1, kept] for part in (output, base, plain))
            require_equal(got, expected, f"inputs masked {name} replaced", EXACT)
            require_finite(output, f"inputs masked {name}: output")
            if mixes(module) and not (spec.pattern == Pattern.CAUSAL_SELF and name == "right"):
                require_different(expected, unmasked, f"a mask on the {name} changes nothing: key_mask is ignored")


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


def check_heads(factory: Factory, spec: LayerSpec) -> None:
    """Heads stay apart: a key-value head reaches the query heads of its group, a query head itself."""
    for heads, kv_heads in ((HEADS, HEADS), (6, 2)):
        module = build(factory, replace(spec, num_heads=heads, num_kv_heads=kv_heads))
        if not isinstance(module, QKVAttention):
            raise NotApplicable("it has no query, key and value heads")
        kv_heads = module.spec.kv_heads  # a mechanism may bring its own number
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
                own = head * kv_heads // count
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
