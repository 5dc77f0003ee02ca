"""Handwritten digits as sequences of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from tasks._classification import Classification, classification_spec, labelled
from tasks.base import SPLITS, Batch, Tokens

SIDE, LEVELS = 8, 17
SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}


class Digits(Classification):
    """Which digit is it: 1797 real images of 8 x 8 pixels, read row by row as 64 tokens of 17 grey levels.

    The smallest image-sequence task: `spec.grid` is (8, 8), so a two-dimensional mechanism sees rows and columns and
    the others a line. The images are the test half of UCI's optical digits, as scikit-learn ships them; nothing is
    downloaded. They are shuffled once, by a fixed permutation, and cut into 70 % train, 10 % valid and 20 % test; the
    images are all different from each other. Writers are not known, so both sides of a cut may hold the same hand.

    Source: Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49 (CC BY 4.0). In the line of Long Range Arena's
    pixel sequences (Tay et al. 2020, https://arxiv.org/abs/2011.04006, section 2.2.4), at a size for a CPU.
    """

    version = 2  # 2: the confusion matrix and macro F1
    name = "digits"
    protocol = "pixels"
    key = "digit"
    classes = tuple(map(str, range(10)))

    def __init__(self) -> None:
        self.spec = classification_spec(Tokens(vocab_size=LEVELS), self.classes, SIDE * SIDE, grid=(SIDE, SIDE))

    def examples(self, split: str) -> Batch:
        images, labels = _images()
        order = np.random.default_rng(0).permutation(len(images))
        ends = np.cumsum([round(SHARES[name] * len(images)) for name in SPLITS[:-1]])
        rows = dict(zip(SPLITS, np.split(order, ends), strict=True))[split]
        return labelled(images[rows], labels[rows], key="digit")

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, np.ndarray]]:
        """Grey levels from 0 to 1."""
        return {"linear, pixels": {split: part.inputs.numpy() / (LEVELS - 1) for split, part in splits.items()}}


@cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels [1797, 64] and labels [1797], small integers."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data.astype(np.uint8), data.target.astype(np.uint8)
