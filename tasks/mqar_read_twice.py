"""MQAR whose whole input is read twice."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tasks import _skill_solvers as solver
from tasks._mqar_segments import whole
from tasks._skill_rows import repeated
from tasks.base import Batch, TaskSpec
from tasks.mqar import MQAR


class ReadTwice(MQAR):
    """MQAR whose whole input is read `repeats` times: from the second reading on it is known what will be asked.

    Labels stand in the last reading. Data, protocols and keywords are MQAR's.

    Source: Arora et al. 2024 (JRT), https://arxiv.org/abs/2407.05483: prompts repeated for recurrent models.
    """

    version = 1
    name = "mqar_read_twice"

    def __init__(self, *, repeats: int = 2, **base: Any):
        super().__init__(**base)
        whole("repeats", repeats, 1)
        self.repeats = repeats
        self.spec = TaskSpec(**{**vars(self.spec), "length": repeats * self.spec.length})

    @property
    def id(self) -> str:
        return f"{super().id},repeats={self.repeats}"

    def segments(self, split: str, seed: int) -> list[Batch]:
        return [repeated(batch, self.repeats) for batch in super().segments(split, seed)]

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        values = self.vocab_size // 2, self.vocab_size
        found = {"most_frequent_answer": solver.most_frequent, "latest_answer": solver.latest}
        return {
            name: solver.accuracy(self, functools.partial(predict, answers=values), splits["test"])
            for name, predict in found.items()
        }
