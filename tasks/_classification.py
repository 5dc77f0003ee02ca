"""Classification of whole sequences: what the tasks with one label per example share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks._batches import in_order, shuffled
from tasks.base import SPLITS, Batch, Metric, PerSequence, Score, Task, TaskSpec, Tokens, Vectors

STRENGTHS = 0.01, 0.1, 1.0, 10.0, 100.0  # inverse regularisation of the linear floors, chosen on valid


class Classification(Task):
    """A published data set with one class per example: fixed splits, accuracy, macro F1 and the confusion matrix.

    Class attributes:
        key: what a class is called in the slices, such as class or digit.

    Attributes:
        classes: their names, in the order of the targets.
    """

    seeded = False
    key: ClassVar[str] = "class"
    classes: Sequence[str]

    @abstractmethod
    def examples(self, split: str) -> Batch:
        """All examples of a split in one padded batch; its slices have `length` [B] where lengths differ."""

    def features(self, splits: Mapping[str, Batch]) -> Mapping[str, Mapping[str, Any]]:
        """Simple features for linear floors: name -> split -> matrix [N, F], dense or sparse, fitted on train."""
        return {}

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        return [self.examples(split)]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        if generator is None:
            yield from in_order(segments, batch_size)
        else:
            yield from shuffled(segments, batch_size, generator)

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Scores of predictions [N, 1].

        Accuracy over all examples, by class, and by `length`: a band 2^(k-1)+1 .. 2^k is named 2^k, and the last one
        by the longest input. "share" by `confusion`: how many of a class are taken for each, as "true>predicted".
        """
        if predictions.shape != segment.targets.shape:
            raise ValueError(f"predictions must be {list(segment.targets.shape)}, got {list(predictions.shape)}")
        true, found = segment.targets[:, 0].long(), predictions[:, 0].long()
        right = (true == found).double()
        scores = [_accuracy(right)]
        number = len(self.classes)
        table = torch.bincount(true * number + found, minlength=number * number).view(number, number)
        for row, name in zip(table, self.classes, strict=True):
            if count := int(row.sum()):
                shares = (row.double() / count).tolist()
                scores += [
                    Score(metric="share", value=share, count=count, slice=("confusion", f"{name}>{other}"))
                    for other, share in zip(self.classes, shares, strict=True)
                ]
        scores += [
            _accuracy(right[true == index], (self.key, name))
            for index, name in enumerate(self.classes)
            if (true == index).any()
        ]
        if "length" in segment.slices:
            bands = torch.bucketize(segment.slices["length"].long(), 2 ** torch.arange(32))
            scores += [
                _accuracy(right[bands == band], ("length", str(min(2**band, self.spec.length))))
                for band in bands.unique().tolist()
            ]
        return scores

    def derived(self, scores: Mapping[tuple[str, tuple[str, str]], Score]) -> Iterable[Score]:
        """Macro F1: the mean over the classes, those that neither occur nor are predicted left out."""
        number = len(self.classes)
        table = np.zeros((number, number))
        for i, true in enumerate(self.classes):
            for j, found in enumerate(self.classes):
                if score := scores.get(("share", ("confusion", f"{true}>{found}"))):
                    table[i, j] = score.value * score.count
        either = table.sum(0) + table.sum(1)
        f1 = 2 * np.diag(table)[either > 0] / either[either > 0]
        yield Score(metric="macro_f1", value=float(f1.mean()), count=round(table.sum()))

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """Accuracy on test of train's commonest class and of a linear model on each of the `features`."""
        whole = {split: segments[0].to(torch.device("cpu")) for split, segments in splits.items()}
        labels = {split: segment.targets[:, 0].long().numpy() for split, segment in whole.items()}
        majority = np.bincount(labels["train"]).argmax()
        floors = {"majority": float((labels["test"] == majority).mean())}
        for name, matrices in self.features(whole).items():
            floors[name] = linear_accuracy(matrices, labels)
        return floors


def classification_spec(
    inputs: Tokens | Vectors, classes: Sequence[str], length: int, grid: tuple[int, ...] | None = None
) -> TaskSpec:
    """The spec of a task of this kind."""
    return TaskSpec(
        inputs=inputs,
        output=PerSequence(num_classes=len(classes)),
        length=length,
        grid=grid,
        causal=False,
        metrics={
            "accuracy": Metric(unit="fraction", higher_is_better=True),
            "macro_f1": Metric(unit="fraction", higher_is_better=True),
            "loss": Metric(unit="nats", higher_is_better=False),
        },
        primary="accuracy",
        chance=1 / len(classes),
    )


def labelled(
    inputs: np.ndarray, labels: np.ndarray, lengths: np.ndarray | None = None, *, key: str | None = None
) -> Batch:
    """A split as one batch.

    Args:
        inputs: [N, L] small integers or [N, L, F] float32, padded on the right.
        labels: [N] classes.
        lengths: [N] positions before the padding; None: there is none.
        key: slice under which the label stands, too.
    """
    targets = torch.from_numpy(labels.astype(np.uint8))[:, None]
    slices = {} if key is None else {key: targets[:, 0]}
    mask = None
    if lengths is not None:
        slices["length"] = torch.from_numpy(lengths.astype(np.int32))
        mask = torch.arange(inputs.shape[1])[None] < slices["length"][:, None]
    return Batch(
        inputs=torch.from_numpy(inputs),
        positions=torch.zeros_like(targets),
        targets=targets,
        slices=slices,
        key_mask=mask,
    )


def linear_accuracy(matrices: Mapping[str, Any], labels: Mapping[str, np.ndarray]) -> float:
    """Accuracy on test of logistic regression fitted on train, its regularisation chosen on valid."""
    return float(linear_model(matrices, labels).score(matrices["test"], labels["test"]))


def linear_model(matrices: Mapping[str, Any], labels: Mapping[str, np.ndarray]) -> Any:
    """Logistic regression fitted on train, its regularisation chosen on valid."""
    from sklearn.linear_model import LogisticRegression

    best, chosen = -1.0, None
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 300 steps are enough for a floor, converged or not
            model.fit(matrices["train"], labels["train"])
        if (valid := float(model.score(matrices["valid"], labels["valid"]))) > best:
            best, chosen = valid, model
    return chosen


def _accuracy(right: Tensor, part: tuple[str, str] = ("all", "")) -> Score:
    return Score(metric="accuracy", value=right.mean().item(), count=len(right), slice=part)
