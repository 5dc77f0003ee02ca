"""MQAR with keys of two tokens, each of them part of several keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks import _mqar_bindings
from tasks._binding_recall import BindingRecall
from tasks._mqar_bindings import lay_out
from tasks._mqar_data import distinct, race
from tasks._mqar_segments import slot_weights
from tasks._skill_rows import Rows


class CompositionalMQAR(BindingRecall):
    """A key is two tokens, each of them part of several keys: only both together name the value.

    A sequence draws g first and g second tokens and binds all K = g * g combinations, in random order, to distinct
    values: `k1 k2 value` K times, then `k1 k2` in slots of three. With K = 4, a and b first, x and y second tokens:

        input   a y 7  b x 9  a x 5  b y 8   b x .  a x .  ...
        label                                  9      5

    Args:
        vocab_size: V; a third each of first tokens (from 1), second tokens and values.
        train, valid, test: segments {length, num_pairs, num_examples}; num_pairs a square, length >= 6 * num_pairs.
        repeats: how often the whole input is read; labels stand in the last reading.

    Source: the published code of Zoology (Arora et al. 2023, https://arxiv.org/abs/2312.04927), not in the paper.
    """

    version = 1
    name = "mqar_compositional"
    key_size = 2
    replay = staticmethod(_mqar_bindings.compositional)

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        length, pairs = setting["length"], setting["num_pairs"]
        third, side = self.vocab_size // 3, round(pairs**0.5)
        one, two = 1 + distinct(rng, n, side, third - 1), third + distinct(rng, n, side, third)
        pair = race(rng, n, np.ones(pairs))
        key = np.stack([np.take_along_axis(one, pair // side, 1), np.take_along_axis(two, pair % side, 1)], 2)
        value = self.first_value + distinct(rng, n, pairs, self.vocab_size - self.first_value)
        slots = race(rng, n, slot_weights((length - 3 * pairs) // 3, self.power_a))[:, :pairs]
        return lay_out(key, value, None, slots, self._filled(rng, key, length))
