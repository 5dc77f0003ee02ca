"""Set disjointness: two lists share one token, and the order in which they are read decides what must be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks._mqar_data import distinct, token_dtype
from tasks._skill_rows import Rows
from tasks._skills import Skill
from tasks.base import IGNORE, Batch

PREFIX, BETWEEN, ASK, SPECIAL = 1, 2, 3, 4  # 0 is the published mask token, unused by a causal reader
ORDERS = "short_first", "long_first", "equal"


class DisjointSets(Skill):
    """Name the one token that stands in both lists: `1 list 2 list 3`, answered at the 3.

    Who reads the short list first needs to keep only that; who reads the long one first must keep it all, unless the
    input is read twice (`repeats: 2`). All tokens are drawn without replacement but for the shared one, which takes a
    drawn place in either list.

    Args:
        vocab_size: V; list tokens 4 .. V - 1.
        train, valid, test: segments {first, second, num_examples}: the lengths of both lists.
        repeats: how often the whole input is read; the label stands in the last reading.

    Source: Arora et al. 2024 (JRT), https://arxiv.org/abs/2407.05483, section 3 (communication complexity of set
    disjointness); sizes from the published code. Differs: splits are disjoint; no seed of theirs is replayed.
    """

    version = 1
    name = "disjoint_sets"
    protocol = "clean"
    keys = "first", "second"
    least: ClassVar = {"vocab_size": SPECIAL + 2}

    @property
    def choices(self) -> int:
        return self.vocab_size - SPECIAL

    def _check(self, where: str, **setting: Any) -> None:
        both = setting["first"] + setting["second"]
        if both - 1 > self.choices:
            raise ValueError(
                f"{where}first + second must be at most {self.choices + 1} with vocab_size={self.vocab_size}, "
                f"got {both}; nearest: vocab_size={both - 1 + SPECIAL}"
            )

    def _length(self, **setting: Any) -> int:
        return setting["first"] + setting["second"] + 3

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        first, second = setting["first"], setting["second"]
        dtype = token_dtype(self.vocab_size, self.spec.length)
        tokens = (SPECIAL + distinct(rng, n, first + second - 1, self.vocab_size - SPECIAL)).astype(dtype)
        row, place = np.arange(n), rng.integers(first, size=n)
        shared = tokens[row, place]
        there = rng.integers(second, size=n)
        other = np.insert(tokens[:, first:], second - 1, 0, axis=1)
        other[row, -1], other[row, there] = other[row, there], shared  # the displaced token moves to the end
        special = [np.full((n, 1), token, dtype) for token in (PREFIX, BETWEEN, ASK)]
        inputs = np.concatenate([special[0], tokens[:, :first], special[1], other, special[2]], 1)
        labels, distance = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        labels[:, -1] = shared
        distance[:, -1] = second - there
        order = np.full(n, 2 if first == second else int(first > second), np.int8)
        short = np.full(n, min(first, second), np.int32)
        return {"inputs": inputs, "labels": labels, "distance": distance, "order": order, "short": short}

    def _label(self, name: str, value: int) -> str:
        return ORDERS[value] if name == "order" else str(value)

    def _solvers(self) -> dict[str, Callable[[Batch], Tensor]]:
        return {"first_of_the_short_list": first_of_short}


def first_of_short(segment: Batch) -> Tensor:
    """The token that opens the shorter list: right once in as many times as that list is long."""
    opens = torch.where(segment.slices["order"].long() == 1, BETWEEN, PREFIX)
    place = (segment.inputs.long() == opens[:, None]).int().argmax(1, keepdim=True)
    return segment.inputs.long().gather(1, place + 1)
