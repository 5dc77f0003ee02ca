"""MQAR on vectors for tokens: key and value in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks._mqar_data import distinct, race
from tasks._mqar_segments import read_vocabulary, whole
from tasks._skill_rows import Rows
from tasks._skills import Settings, Skill
from tasks.base import IGNORE, Batch, Vectors


class ContinuousMQAR(Skill):
    """MQAR without tokens: every step holds a key and its value side by side, so nothing must be shifted to bind them.

    Steps are vectors [key ; value] of 2 * dim numbers: all K pairs `passes` times, each time in a new order, then K
    questions [key ; 0]. The answer is which of the values it is. Keys and values are unit vectors drawn once for all
    splits of a seed.

    Args:
        vocab_size: number of vectors, half keys and half values.
        dim: of each of them.
        passes: how often the pairs are shown.
        train, valid, test: segments {num_pairs, num_examples}.

    Source: the published code of Zoology (Arora et al. 2023, https://arxiv.org/abs/2312.04927), January 2026. Differs:
    no seed of theirs is replayed, as their vectors are those of the model's embedding.
    """

    version = 1
    name = "mqar_continuous"
    protocol = "clean"
    keys = ("num_pairs",)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        train: Settings,
        valid: Settings,
        test: Settings,
        passes: int = 1,
    ):
        read_vocabulary(vocab_size, 1)
        whole("dim", dim, 1)
        whole("passes", passes, 1)
        self.values, self.dim, self.passes = vocab_size // 2, dim, passes
        self._read(train, valid, test, Vectors(dim=2 * dim))

    @property
    def choices(self) -> int:
        return self.values

    def _check(self, where: str, **setting: Any) -> None:
        if setting["num_pairs"] > self.values:
            raise ValueError(
                f"{where}num_pairs must be at most vocab_size / 2 = {self.values}, got {setting['num_pairs']}"
            )

    def _length(self, **setting: Any) -> int:
        return (self.passes + 1) * setting["num_pairs"]

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """`a_shown_value`: what guessing among the values of the sequence gives on average."""
        shares = [(1 / int(segment.slices["pairs"][0]), len(segment)) for segment in splits["test"]]
        shown = sum(share * count for share, count in shares) / sum(count for _, count in shares)
        return {**super().solvers(splits), "a_shown_value": shown}

    def _seeded(self, setting: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        table = self._generator("vectors", f"seed={seed}").standard_normal((2, self.values, self.dim))
        return {**setting, "table": (table / np.linalg.norm(table, axis=-1, keepdims=True)).astype(np.float32)}

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        pairs = setting["num_pairs"]
        keys, values = setting["table"]
        key, value = distinct(rng, n, pairs, self.values), distinct(rng, n, pairs, self.values)
        order = np.concatenate([race(rng, n, np.ones(pairs)) for _ in range(self.passes + 1)], 1)
        shown = self.passes * pairs
        key, value = np.take_along_axis(key, order, 1), np.take_along_axis(value, order, 1)
        inputs = np.concatenate([keys[key], values[value]], 2)
        inputs[:, shown:, self.dim :] = 0
        labels = np.full_like(value, IGNORE)
        labels[:, shown:] = value[:, shown:]
        place = np.argsort(order[:, shown - pairs : shown], 1)  # of each pair in its last showing
        distance = np.zeros_like(value)
        distance[:, shown:] = pairs + np.arange(pairs) - np.take_along_axis(place, order[:, shown:], 1)
        return {
            "inputs": inputs,
            "labels": labels,
            "distance": distance,
            "pairs": np.full(n, pairs, np.int32),
            "content": np.concatenate([key, value], 1),
        }
