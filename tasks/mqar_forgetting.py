"""MQAR in which keys are bound anew before they are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from tasks import _mqar_bindings
from tasks._binding_recall import BindingRecall
from tasks._mqar_bindings import lay_out
from tasks._mqar_data import distinct, race
from tasks._mqar_segments import slot_weights
from tasks._skill_rows import Rows
from tasks.base import Batch


class ForgettingMQAR(BindingRecall):
    """MQAR in which U of the K keys are bound anew before anything is asked: only the last value counts.

        input   a 5  b 3  c 7  d 2   c 9  a 1   b .  a .  ...        K = 4, U = 2
        label                                   3    1

    In `clean` a new value is never the old one of the same key; the published code compares it with the value of
    another key, so now and then an update changes nothing (`protocol: zoology` keeps that).

    Args:
        vocab_size: V, even: keys 1 .. V/2 - 1, values V/2 .. V - 1.
        train, valid, test: segments {length, num_pairs, num_updates, num_examples};
            length >= 2 * (2 * num_pairs + num_updates).
        repeats: how often the whole input is read; labels stand in the last reading.

    Source: the published code of Zoology (Arora et al. 2023, https://arxiv.org/abs/2312.04927), not in the paper.
    """

    version = 1
    name = "mqar_forgetting"
    key_size = 1
    keys = "length", "num_pairs", "num_updates"
    replay = staticmethod(_mqar_bindings.forgetting)

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        length, pairs, updates = setting["length"], setting["num_pairs"], setting["num_updates"]
        values = self.vocab_size - self.first_value
        key = 1 + distinct(rng, n, pairs, self.first_value - 1)
        value = distinct(rng, n, pairs, values)
        chosen = race(rng, n, np.ones(pairs))[:, :updates]
        new = rng.integers(values - 1, size=(n, updates))
        new += new >= np.take_along_axis(value, chosen, 1)
        slots = race(rng, n, slot_weights(length // 2 - pairs - updates, self.power_a))[:, :pairs]
        update = chosen, self.first_value + new
        return lay_out(key[..., None], self.first_value + value, update, slots, self._filled(rng, key, length))

    def _label(self, name: str, value: int) -> str:
        return ("kept", "updated")[value] if name == "class" else str(value)

    def _solvers(self) -> dict[str, Callable[[Batch], Tensor]]:
        return {"first_value": first_values}


def first_values(segment: Batch) -> Tensor:
    """What followed a question's key where it stood first: right for keys that were not bound anew."""
    inputs, positions = segment.inputs.long(), segment.positions.long()
    asked = inputs.gather(1, positions)
    place = (inputs[:, None] == asked[..., None]).int().argmax(-1)  # the first of equals
    return inputs.gather(1, place + 1)
