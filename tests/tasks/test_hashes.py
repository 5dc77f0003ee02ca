"""Hashes of a data set: those of the whole buffers, however large it is."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tasks.base import HASHED, Batch, sha256

N = 2 * HASHED + 1


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(3 * N, dtype=torch.int16).view(N, 3), torch.randn(2, N).T, torch.zeros(0, 5), torch.tensor(3)],
    ids=["small integers", "not contiguous", "empty", "one number"],
)
def test_slices_are_hashed_as_the_buffer_in_one_piece(tensor):
    kind = "<f4" if tensor.is_floating_point() else "<i8"
    assert sha256(tensor) == hashlib.sha256(np.ascontiguousarray(tensor.numpy(), dtype=kind).tobytes()).hexdigest()


def test_labels_are_hashed_as_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        inputs=torch.zeros(N, 7, dtype=torch.uint8),
        positions=torch.randint(7, (N, 1), generator=generator),
        targets=torch.randint(3, (N, 1), generator=generator),
        key_mask=torch.ones(N, 7, dtype=torch.bool),
    )
    assert batch.sha256()["labels"] == sha256(batch.labels())
