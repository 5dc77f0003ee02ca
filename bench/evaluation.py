"""Scoring a split: predictions of every segment, gathered once, scored by the task on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.backbones.base import Backbone
from bench.config import Budget
from bench.program import autocast, output_of
from tasks.base import IGNORE, Batch, Score, Task


@dataclass
class Scores:
    """Scores of a split, one entry per (metric, slice)."""

    entries: dict[tuple[str, tuple[str, str]], Score]

    def value(self, metric: str) -> float:
        """The metric over the whole split."""
        return self.entries[metric, ("all", "")].value

    def rows(self, split: str) -> list[dict]:
        """Long form: split, metric, value, count, slice_key, slice_value."""
        return [
            dict(
                split=split, metric=s.metric, value=s.value, count=s.count, slice_key=s.slice[0], slice_value=s.slice[1]
            )
            for s in self.entries.values()
        ]


def evaluate(model: Backbone, task: Task, segments: Sequence[Batch], budget: Budget) -> Scores:
    """Score all examples of a split without dropout; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    entries: dict[tuple[str, tuple[str, str]], Score] = {}
    with torch.no_grad():
        for segment in segments:
            predictions, losses = [], []
            for start in range(0, len(segment), budget.eval_batch_size):
                batch = segment.rows(slice(start, start + budget.eval_batch_size))
                with autocast(budget, batch.inputs.device):
                    output = output_of(model, batch)
                predictions.append(task.predict(output, batch))
                losses.append(task.loss(output, batch) * (batch.targets != IGNORE).sum())
            labels = int((segment.targets != IGNORE).sum())
            loss = float(torch.stack(losses).sum()) / max(1, labels)
            cpu = torch.device("cpu")
            _add(entries, Score(metric="loss", value=loss, count=labels))
            for score in task.score(torch.cat(predictions).to(cpu), segment.to(cpu)):
                _add(entries, score)
    for score in list(task.derived(entries)):
        entries[score.metric, score.slice] = score
    model.train(was_training)
    return Scores(entries)


def _add(entries: dict[tuple[str, tuple[str, str]], Score], score: Score) -> None:
    """Pool a score with the one of the same slice, weighted by count."""
    key = score.metric, score.slice
    old = entries.get(key)
    if old is not None and old.count + score.count > 0:
        count = old.count + score.count
        value = (old.value * old.count + score.value * score.count) / count
        score = Score(metric=score.metric, value=value, count=count, slice=score.slice)
    entries[key] = score
