"""Accuracy of recalled values, over all and by slice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tasks.base import IGNORE, Batch, Score


def recall_scores(predictions: Tensor, segment: Batch) -> list[Score]:
    """Accuracy of predictions [N, P]: the mean over examples of each example's share of right answers (Zoology's).

    Per example (count: examples) by `segment` ("64x4", length x pairs), `length` and `pairs`. Per query (count:
    queries) by the other slices [N, P] of the segment, such as `distance` and `order`, in ranges of powers of two.
    """
    shape = segment.targets.shape
    if predictions.shape != shape:
        raise ValueError(f"predictions must be [N, P] = {list(shape)} like the targets, got {list(predictions.shape)}")
    labelled = segment.targets != IGNORE
    correct = (predictions == segment.targets) & labelled
    per_example = correct.sum(1).double() / labelled.sum(1)
    scores = [Score(metric="accuracy", value=per_example.mean().item(), count=len(segment))]
    length, pairs = segment.slices["length"].long(), segment.slices["pairs"].long()
    scores += by_group("segment", length << 32 | pairs, per_example, lambda cell: f"{cell >> 32}x{cell & 0xFFFFFFFF}")
    scores += by_group("length", length, per_example, str)
    scores += by_group("pairs", pairs, per_example, str)
    powers = 2 ** torch.arange(32)
    for name, values in segment.slices.items():
        if values.dim() == 2:
            bucket = torch.bucketize(values[labelled].long(), powers, right=True)
            scores += by_group(name, bucket, correct[labelled].double(), power_range)
    return scores


def by_group(key: str, group: Tensor, value: Tensor, label: Callable[[int], str]) -> list[Score]:
    """Mean of value [n] in each group [n]."""
    groups, member, count = group.unique(return_inverse=True, return_counts=True)
    mean = torch.bincount(member, weights=value) / count
    return [
        Score(metric="accuracy", value=m, count=c, slice=(key, label(g)))
        for g, m, c in zip(groups.tolist(), mean.tolist(), count.tolist(), strict=True)
    ]


def power_range(bucket: int) -> str:
    """Bucket b > 0 holds 2^(b-1) .. 2^b - 1; bucket 0 holds 0."""
    first, last = 2**bucket // 2, 2**bucket - 1
    return str(first) if first == last else f"{first}-{last}"
