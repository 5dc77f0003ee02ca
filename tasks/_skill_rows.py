"""Examples of generated skills as arrays, and how they become batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.base import IGNORE, Batch

Array = NDArray[Any]
Rows = dict[str, Array]  # inputs [n, L] or [n, L, F], labels [n, L], slices [n] or [n, L], by name


def part_of(content: Array) -> Array:
    """One of eight parts [n] for sequences of integers [n, L], by their content alone."""
    flat = content.reshape(len(content), -1)
    odd = np.random.default_rng(8).integers(2**63, size=flat.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return ((flat.astype(np.uint64) + np.uint64(1)) * odd).sum(1, dtype=np.uint64) >> np.uint64(61)


def as_batch(rows: Rows) -> Batch:
    """Rows with a label, or IGNORE, at every position to a Batch of the labelled positions."""
    labels = rows["labels"]
    n, length = labels.shape
    labelled = labels != IGNORE
    width = int(labelled.sum(1).max())
    columns = np.argsort(~labelled, axis=1, kind="stable")[:, :width]
    targets = np.take_along_axis(labels, columns, 1)
    positions = np.where(targets != IGNORE, columns, 0).astype(np.int16 if length < 2**15 else np.int32)
    slices = {
        name: values if values.ndim == 1 else np.take_along_axis(values, columns, 1)
        for name, values in rows.items()
        if name not in ("inputs", "labels")
    }
    slices["length"] = np.full(n, length, np.int32)
    return Batch(
        inputs=torch.from_numpy(rows["inputs"]),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        slices={name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in slices.items()},
    )


def repeated(batch: Batch, times: int) -> Batch:
    """The inputs read several times in a row, labels in the last reading."""
    if times == 1:
        return batch
    length = batch.inputs.shape[1]
    positions = batch.positions.long() + length * (times - 1)
    positions = positions.masked_fill(batch.targets == IGNORE, 0)
    small = torch.int16 if length * times < 2**15 else torch.int32
    inputs = batch.inputs.repeat(1, times, *[1] * (batch.inputs.dim() - 2))
    mask = None if batch.key_mask is None else batch.key_mask.repeat(1, times)
    return replace(batch, inputs=inputs, positions=positions.to(small), key_mask=mask)


def next_tokens(tokens: Array) -> Array:
    """Labels of language modelling: [n, L] of the L + 1 tokens."""
    return tokens[:, 1:].copy()
