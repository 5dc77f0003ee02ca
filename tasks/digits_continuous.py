"""Handwritten digits as sequences of real grey values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tasks.base import Batch, Vectors
from tasks.digits import LEVELS, Digits


class DigitsContinuous(Digits):
    """The images of `digits` in the same splits, one real number from 0 to 1 at every pixel instead of a token.

    So the difference between the two boards is what it costs a mechanism to learn that grey levels are ordered.

    Source: see `tasks.digits`; continuous pixels as in S4 (Gu et al. 2021, https://arxiv.org/abs/2111.00396, section
    4.2).
    """

    version = 1
    name = "digits_continuous"
    protocol = "continuous"

    def __init__(self) -> None:
        super().__init__()
        self.spec = dataclasses.replace(self.spec, inputs=Vectors(dim=1))

    def examples(self, split: str) -> Batch:
        tokens = super().examples(split)
        return dataclasses.replace(tokens, inputs=tokens.inputs[..., None].float() / (LEVELS - 1))

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, np.ndarray]]:
        return {"linear, pixels": {split: part.inputs[..., 0].numpy() for split, part in splits.items()}}
