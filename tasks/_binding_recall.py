"""What compositional and forgetting MQAR share: bindings, then every key asked once at a power-law distance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from tasks import _cache
from tasks._mqar_data import published_seeds, token_dtype
from tasks._mqar_segments import read_vocabulary, whole
from tasks._skills import ACCURACY, Rows, Settings, Skill, as_batch, one_of, read_settings
from tasks.base import SPLITS, Batch, PerToken, TaskSpec, Tokens

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
    keys: ClassVar[tuple[str, ...]] = "length", "num_pairs"  # of a setting, beside num_examples
    replay: ClassVar[Callable[..., Rows]]  # the published generator

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        train: Settings,
        valid: Settings,
        test: Settings,
        power_a: float = 0.01,
        repeats: int = 1,
    ):
        one_of("protocol", protocol, PROTOCOLS)
        whole("repeats", repeats, 1)
        read_vocabulary(vocab_size + vocab_size % 2 * (self.key_size - 1), power_a)
        self.protocol, self.vocab_size, self.power_a = protocol, vocab_size, float(power_a)
        self.seeded, self.repeats = protocol == "clean", repeats
        splits = dict(zip(SPLITS, (train, valid, test), strict=True))
        self._settings = read_settings(splits, self.keys, {"num_updates": 0})
        for split, settings in self._settings.items():
            for i, setting in enumerate(settings):
                self._check(f"{split}[{i}]", **setting)
        self.first_value = vocab_size // (self.key_size + 1) * self.key_size
        self.answers = self.first_value, vocab_size
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=vocab_size),
            output=PerToken(num_classes=vocab_size),
            length=repeats * max(s["length"] for settings in self._settings.values() for s in settings),
            causal=True,
            metrics=ACCURACY,
            primary="accuracy",
            chance=1 / (vocab_size - self.first_value),
        )

    def _check(self, where: str, *, length: int, num_pairs: int, num_updates: int = 0, **_: int) -> None:
        needed = (self.key_size + 1) * (2 * num_pairs + num_updates)
        if length < needed:
            raise ValueError(
                f"{where}.length must be at least {needed} for {num_pairs} pairs"
                + (f" and {num_updates} updates" if num_updates else "")
                + f", got {length}; nearest: length={needed}"
            )
        if num_updates > num_pairs:
            raise ValueError(f"{where}.num_updates must be at most num_pairs={num_pairs}, got {num_updates}")
        side, most = round(num_pairs ** (1 / self.key_size)), self.vocab_size // (self.key_size + 1) - 1
        if side**self.key_size != num_pairs:
            raise ValueError(f"{where}.num_pairs must be a square, got {num_pairs}; nearest: {side**2}")
        if side > most:
            raise ValueError(f"{where}.num_pairs={num_pairs} needs more than {most} keys; raise vocab_size")

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
