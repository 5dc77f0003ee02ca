"""From segments to batches: in order, shuffled, and segments of several widths as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.base import IGNORE, Batch


def in_order(segments: Sequence[Batch], batch_size: int) -> Iterator[Batch]:
    """Contiguous batches, segment by segment."""
    for segment in segments:
        for start in range(0, len(segment), batch_size):
            yield segment.rows(slice(start, start + batch_size))


def shuffled(pools: Sequence[Batch], batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Every example once: batches of one pool each, examples and batches in random order."""
    orders = [torch.randperm(len(pool), generator=generator).to(pool.inputs.device) for pool in pools]
    plan = [(pool, rows) for pool, order in zip(pools, orders, strict=True) for rows in order.split(batch_size)]
    for i in torch.randperm(len(plan), generator=generator).tolist():
        pool, rows = plan[i]
        yield pool.rows(rows)


def of_one_length(segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
    """Every example once: segments of equal length mixed, batches in random order; in order without a generator."""
    if generator is None:
        yield from in_order(segments, batch_size)
        return
    by_length: dict[int, list[Batch]] = {}
    for segment in segments:
        by_length.setdefault(segment.inputs.shape[1], []).append(segment)
    yield from shuffled([merge(group) for group in by_length.values()], batch_size, generator)


def merge(segments: Sequence[Batch], pad: int = 0) -> Batch:
    """Segments as one, padded on the right to the widest: inputs and context with `pad` under a mask, labels IGNORE."""
    if len(segments) == 1:
        return segments[0]

    def joined(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
        if tensors[0].dim() == 1:
            return torch.cat(list(tensors))
        width = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors])

    def stream(tokens: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        if all(mask is None for mask in masks) and len({part.shape[1] for part in tokens}) == 1:
            return joined(tokens), None
        known = [
            torch.ones_like(part, dtype=torch.bool) if mask is None else mask
            for part, mask in zip(tokens, masks, strict=True)
        ]
        return joined(tokens, pad), joined(known)

    inputs, key_mask = stream([s.inputs for s in segments], [s.key_mask for s in segments])
    contexts = [segment.context for segment in segments if segment.context is not None]
    context, context_mask = stream(contexts, [s.context_mask for s in segments]) if contexts else (None, None)
    return Batch(
        inputs=inputs,
        positions=joined([segment.positions for segment in segments]),
        targets=joined([segment.targets for segment in segments], IGNORE),
        slices={name: joined([segment.slices[name] for segment in segments]) for name in segments[0].slices},
        key_mask=key_mask,
        context=context,
        context_mask=context_mask,
    )
