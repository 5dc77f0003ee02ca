"""What compositional and forgetting MQAR share: bindings, then every key asked once at a power-law distance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from tasks import _cache
from tasks._mqar_data import published_seeds, token_dtype
from tasks._mqar_segments import read_vocabulary
from tasks._skill_rows import Rows, as_batch
from tasks._skills import Skill, one_of
from tasks.base import Batch

PROTOCOLS = "clean", "zoology"


class BindingRecall(Skill):
    """Keys of `key_size` tokens are bound to values, then each is asked once.

    Protocols:
        clean: ours. A filler is uniform over all tokens that are not keys of its sequence.
        zoology: the published generator with filler 0 and seeds from the stream of 123 (train, then test; `valid`,
            which they have not, from the next draws), whatever `seed` is. Their other filler is random and depends on
            the model that was built before it, so it cannot be reproduced.

    Args:
        protocol: clean or zoology.
        vocab_size: V, cut into equal parts for each token of a key and for values.
        train, valid, test: segments {num_examples, and `keys`}.
        power_a: exponent of the law of the distances; 1 is uniform, small prefers near ones.
        repeats: how often the whole input is read; labels stand in the last reading.
    """

    key_size: ClassVar[int]  # tokens of a key
    keys: ClassVar[tuple[str, ...]] = "length", "num_pairs"
    least: ClassVar = {"num_updates": 0}
    replay: ClassVar[Callable[..., Rows]]  # the published generator

    def __init__(self, *, protocol: str, vocab_size: int, power_a: float = 0.01, **base: Any):
        one_of("protocol", protocol, PROTOCOLS)
        read_vocabulary(vocab_size + vocab_size % 2 * (self.key_size - 1), power_a)
        self.protocol, self.seeded, self.power_a = protocol, protocol == "clean", float(power_a)
        self.first_value = vocab_size // (self.key_size + 1) * self.key_size
        super().__init__(vocab_size=vocab_size, **base)

    @property
    def answers(self) -> tuple[int, int]:
        return self.first_value, self.vocab_size

    def _check(self, where: str, **setting: Any) -> None:
        length, num_pairs, num_updates = setting["length"], setting["num_pairs"], setting.get("num_updates", 0)
        needed = (self.key_size + 1) * (2 * num_pairs + num_updates)
        if length < needed:
            raise ValueError(
                f"{where}length must be at least {needed} for {num_pairs} pairs"
                + (f" and {num_updates} updates" if num_updates else "")
                + f", got {length}; nearest: length={needed}"
            )
        if num_updates > num_pairs:
            raise ValueError(f"{where}num_updates must be at most num_pairs={num_pairs}, got {num_updates}")
        side, most = round(num_pairs ** (1 / self.key_size)), self.vocab_size // (self.key_size + 1) - 1
        if side**self.key_size != num_pairs:
            raise ValueError(f"{where}num_pairs must be a square, got {num_pairs}; nearest: {side**2}")
        if side > most:
            raise ValueError(f"{where}num_pairs={num_pairs} needs more than {most} keys; raise vocab_size")
        if num_pairs > self.vocab_size - self.first_value:
            raise ValueError(
                f"{where}num_pairs must be at most {self.vocab_size - self.first_value}, the values of "
                f"vocab_size={self.vocab_size}, got {num_pairs}; nearest: vocab_size={(self.key_size + 1) * num_pairs}"
            )

    def _given(self, split: str, seed: int) -> list[Batch] | None:
        if self.protocol == "clean":
            return None
        dtype = token_dtype(self.vocab_size, self.spec.length)
        batches = []
        seeds = published_seeds({name: len(settings) for name, settings in self._settings.items()})
        for setting, own in zip(self._settings[split], seeds[split], strict=True):
            law = dict(vocab_size=self.vocab_size, power_a=self.power_a, **setting)
            n = law.pop("num_examples")
            key = dict(task=self.name, protocol=self.protocol, version=self.version, seed=own, n=n, law=law)
            drawn = _cache.arrays(key, functools.partial(self.replay, own, n, **law))
            batches.append(as_batch({name: array.astype(dtype) for name, array in drawn.items()}))
        return batches

    def _filled(self, rng: np.random.Generator, keys: np.ndarray, length: int) -> np.ndarray:
        """Filler [n, length] that is none of `keys` [n, ...]."""
        n = len(keys)
        is_key = np.zeros((n, self.vocab_size), bool)
        np.put_along_axis(is_key, keys.reshape(n, -1), True, 1)
        filler = rng.integers(self.vocab_size, size=(n, length), dtype=token_dtype(self.vocab_size, length))
        while (wrong := np.take_along_axis(is_key, filler.astype(np.int64), 1)).any():
            filler[wrong] = rng.integers(self.vocab_size, size=int(wrong.sum()), dtype=filler.dtype)
        return filler
