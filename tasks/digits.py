"""Handwritten digits as sequences of pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tasks._batches import in_order, shuffled
from tasks.base import SPLITS, Batch, Metric, PerSequence, Score, Task, TaskSpec, Tokens

SIDE, LEVELS, CLASSES = 8, 17, 10
SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}


class Digits(Task):
    """Which digit is it: 1797 real images of 8 x 8 pixels, read row by row as 64 tokens of 17 grey levels.

    The smallest image-sequence task: `spec.grid` is (8, 8), so a two-dimensional mechanism sees rows and columns and
    the others a line. The images are the test half of UCI's optical digits, as scikit-learn ships them; nothing is
    downloaded. They are shuffled once, by a fixed permutation, and cut into 70 % train, 10 % valid and 20 % test; the
    images are all different from each other. Writers are not known, so both sides of a cut may hold the same hand.

    Source: Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49 (CC BY 4.0). In the line of Long Range Arena's
    pixel sequences (Tay et al. 2020, https://arxiv.org/abs/2011.04006, section 2.2.4), at a size for a CPU.
    """

    version = 1
    name = "digits"
    seeded = False
    protocol = "pixels"

    def __init__(self) -> None:
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=LEVELS),
            output=PerSequence(num_classes=CLASSES),
            length=SIDE * SIDE,
            grid=(SIDE, SIDE),
            causal=False,
            metrics={
                "accuracy": Metric(unit="fraction", higher_is_better=True),
                "loss": Metric(unit="nats", higher_is_better=False),
            },
            primary="accuracy",
            chance=1 / CLASSES,
        )

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        images, labels = _images()
        order = np.random.default_rng(0).permutation(len(images))
        ends = np.cumsum([round(SHARES[name] * len(images)) for name in SPLITS[:-1]])
        rows = dict(zip(SPLITS, np.split(order, ends), strict=True))[split]
        targets = torch.from_numpy(labels[rows])[:, None]
        return [
            Batch(
                inputs=torch.from_numpy(images[rows]),
                positions=torch.zeros_like(targets),
                targets=targets,
                slices={"digit": targets[:, 0]},
            )
        ]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        if generator is None:
            yield from in_order(segments, batch_size)
        else:
            yield from shuffled(segments, batch_size, generator)

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Accuracy of predictions [N, 1], over all images and by digit."""
        if predictions.shape != segment.targets.shape:
            raise ValueError(f"predictions must be {list(segment.targets.shape)}, got {list(predictions.shape)}")
        right = (predictions == segment.targets).squeeze(1).double()
        digits = segment.slices["digit"]
        by_digit = [(str(digit), right[digits == digit]) for digit in range(CLASSES)]
        return [
            Score(metric="accuracy", value=right.mean().item(), count=len(segment)),
            *(
                Score(metric="accuracy", value=part.mean().item(), count=len(part), slice=("digit", digit))
                for digit, part in by_digit
                if len(part)
            ),
        ]


@cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels [1797, 64] and labels [1797], small integers."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data.astype(np.uint8), data.target.astype(np.uint8)
