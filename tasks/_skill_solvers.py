"""Who answers without understanding: the floors of generated skills."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tasks.base import IGNORE, Batch, Task


def accuracy(task: Task, predict: Callable[[Batch], Tensor], segments: Sequence[Batch]) -> float:
    """The task's first score of a solver, over all segments."""
    scores = [task.score(predict(segment), segment)[0] for segment in segments]
    return sum(s.value * s.count for s in scores) / sum(s.count for s in scores)


def majority(train: Sequence[Batch], answers: tuple[int, int] | None) -> Tensor:
    """The commonest label of `train`, among the answers where they are known."""
    labels = torch.cat([segment.targets.flatten().long() for segment in train])
    low, high = answers or (0, int(labels.max()) + 1)
    labels = labels[(labels >= low) & (labels < high)]
    return torch.bincount(labels).argmax()


def latest(segment: Batch, answers: tuple[int, int] | None) -> Tensor:
    """The last possible answer at or before each labelled position [N, P]."""
    return _so_far(segment, answers, count=False)


def most_frequent(segment: Batch, answers: tuple[int, int] | None) -> Tensor:
    """The commonest possible answer at or before each labelled position [N, P]; among equals the last to reach it."""
    return _so_far(segment, answers, count=True)


def _so_far(segment: Batch, answers: tuple[int, int] | None, *, count: bool) -> Tensor:
    assert answers is not None
    low, high = answers
    inputs, rows = segment.inputs.long(), torch.arange(len(segment))
    best = torch.full_like(inputs, low)
    seen = torch.zeros(len(segment), high - low, dtype=torch.int32)
    most = torch.zeros(len(segment), dtype=torch.int32)
    now = torch.full((len(segment),), low)
    for t in range(inputs.shape[1]):
        token = inputs[:, t]
        possible = (token >= low) & (token < high)
        at = (token - low).clamp(0, high - low - 1)
        seen[rows, at] += possible.int() if count else 0
        wins = possible & (seen[rows, at] >= most)
        now = torch.where(wins, token, now)
        most = torch.where(wins, seen[rows, at], most)
        best[:, t] = now
    return best.gather(1, segment.positions.long()).masked_fill(segment.targets == IGNORE, 0)
