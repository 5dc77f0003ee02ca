"""MQAR with keys of two tokens, with keys bound anew, with vectors for tokens, and read twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tasks import _cache, _mqar_bindings
from tasks import _skill_solvers as solver
from tasks._mqar_bindings import lay_out, slot_weights
from tasks._mqar_data import distinct, race, token_dtype
from tasks._mqar_segments import read_vocabulary, whole
from tasks._skills import ACCURACY, Rows, Skill, as_batch, one_of, read_settings, repeated
from tasks.base import IGNORE, SPLITS, Batch, PerToken, TaskSpec, Tokens, Vectors
from tasks.mqar import MQAR

PROTOCOLS = "clean", "zoology"
Settings = Sequence[Mapping[str, int]]


class BindingRecall(Skill):
    """What compositional and forgetting MQAR share: bindings, then every key asked once at a power-law distance.

    Protocols:
        clean: ours. A filler is uniform over all tokens that are not keys of its sequence.
        zoology: the published generator with filler 0 and seeds from the stream of 123 (train, then test; `valid`,
            which they have not, from the next draws), whatever `seed` is. Their other filler is random and depends on
            the model that was built before it, so it cannot be reproduced.
    """

    law: str
    key_size: int
    fields: tuple[str, ...]

    def _open(self, protocol: str, vocab_size: int, power_a: float, repeats: int, **splits: Settings) -> None:
        one_of("protocol", protocol, PROTOCOLS)
        whole("repeats", repeats, 1)
        read_vocabulary(vocab_size + vocab_size % 2 * (self.key_size - 1), power_a)
        self.protocol, self.vocab_size, self.power_a = protocol, vocab_size, float(power_a)
        self.seeded, self.repeats = protocol == "clean", repeats
        self._settings = read_settings(splits, self.fields, {"num_updates": 0})
        width, parts = self.key_size + 1, self.key_size + 1
        for split, settings in self._settings.items():
            for i, setting in enumerate(settings):
                pairs, updates = setting["num_pairs"], setting.get("num_updates", 0)
                needed, keys = width * (2 * pairs + updates), vocab_size // parts - 1
                if setting["length"] < needed:
                    raise ValueError(
                        f"{split}[{i}].length must be at least {needed} for {pairs} pairs"
                        + (f" and {updates} updates" if updates else "")
                        + f", got {setting['length']}; nearest: length={needed}"
                    )
                if self.key_size == 2 and round(pairs**0.5) ** 2 != pairs:
                    near = round(pairs**0.5) ** 2
                    raise ValueError(f"{split}[{i}].num_pairs must be a square, got {pairs}; nearest: {near}")
                if max(updates, round(pairs**0.5) if self.key_size == 2 else pairs) > keys:
                    raise ValueError(f"{split}[{i}].num_pairs={pairs} needs more than {keys} keys; raise vocab_size")
                if updates > pairs:
                    raise ValueError(f"{split}[{i}].num_updates must be at most num_pairs={pairs}, got {updates}")
        self.first_value = vocab_size // parts * self.key_size
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

    def _label(self, name: str, value: int) -> str:
        return ("kept", "updated")[value] if name == "class" else str(value)

    def _given(self, split: str, seed: int) -> list[Batch] | None:
        if self.protocol == "clean":
            return None
        dtype = token_dtype(self.vocab_size, self.spec.length)
        batches = []
        make = getattr(_mqar_bindings, self.law)
        for setting, own in zip(self._settings[split], published_seeds(self._settings)[split], strict=True):
            law = dict(vocab_size=self.vocab_size, power_a=self.power_a, **setting)
            n = law.pop("num_examples")
            key = dict(task=self.name, protocol=self.protocol, version=self.version, seed=own, n=n, law=law)
            drawn = _cache.arrays(key, functools.partial(make, own, n, **law))
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


def published_seeds(settings: Mapping[str, Sequence[Any]]) -> dict[str, list[int]]:
    """Seed of every segment in Zoology's framework since February 2024; `valid` is ours."""
    random = np.random.RandomState(123)  # its stream is the protocol
    bounds = {"train": (0, 2**31), "test": (2**31, 2**32), "valid": (0, 2**32)}
    return {
        split: random.randint(*bounds[split], size=len(settings[split]), dtype=np.int64).tolist() for split in bounds
    }


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
    law, key_size, fields = "compositional", 2, ("length", "num_pairs")

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        power_a: float = 0.01,
        repeats: int = 1,
    ):
        self._open(protocol, vocab_size, power_a, repeats, train=train, valid=valid, test=test)

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        length, pairs = setting["length"], setting["num_pairs"]
        third, side = self.vocab_size // 3, round(pairs**0.5)
        one, two = 1 + distinct(rng, n, side, third - 1), third + distinct(rng, n, side, third)
        pair = race(rng, n, np.ones(pairs))
        key = np.stack([np.take_along_axis(one, pair // side, 1), np.take_along_axis(two, pair % side, 1)], 2)
        value = self.first_value + distinct(rng, n, pairs, self.vocab_size - self.first_value)
        slots = race(rng, n, slot_weights((length - 3 * pairs) // 3, self.power_a))[:, :pairs]
        return lay_out(key, value, None, slots, self._filled(rng, key, length))


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
    law, key_size, fields = "forgetting", 1, ("length", "num_pairs", "num_updates")

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        power_a: float = 0.01,
        repeats: int = 1,
    ):
        self._open(protocol, vocab_size, power_a, repeats, train=train, valid=valid, test=test)

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

    def _solvers(self) -> dict[str, Callable[[Batch], Tensor]]:
        return {"first_value": first_values}


def first_values(segment: Batch) -> Tensor:
    """What followed a question's key where it stood first: right for keys that were not bound anew."""
    inputs, positions = segment.inputs.long(), segment.positions.long()
    asked = inputs.gather(1, positions)
    place = (inputs[:, None] == asked[..., None]).int().argmax(-1)  # the first of equals
    return inputs.gather(1, place + 1)


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

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        passes: int = 1,
    ):
        read_vocabulary(vocab_size, 1)
        whole("dim", dim, 1)
        whole("passes", passes, 1)
        self.values, self.dim, self.passes = vocab_size // 2, dim, passes
        self._settings = read_settings(dict(zip(SPLITS, (train, valid, test), strict=True)), ("num_pairs",))
        most = max(s["num_pairs"] for settings in self._settings.values() for s in settings)
        if most > self.values:
            raise ValueError(f"num_pairs must be at most vocab_size / 2 = {self.values}, got {most}")
        self.spec = TaskSpec(
            inputs=Vectors(dim=2 * dim),
            output=PerToken(num_classes=self.values),
            length=(passes + 1) * most,
            causal=True,
            metrics=ACCURACY,
            primary="accuracy",
            chance=1 / self.values,
        )

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


class ReadTwice(MQAR):
    """MQAR whose whole input is read `repeats` times: from the second reading on it is known what will be asked.

    Labels stand in the last reading. Data, protocols and keywords are MQAR's.

    Source: Arora et al. 2024 (JRT), https://arxiv.org/abs/2407.05483: prompts repeated for recurrent models.
    """

    version = 1
    name = "mqar_read_twice"

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        power_a: float = 0.01,
        repeats: int = 2,
    ):
        super().__init__(protocol=protocol, vocab_size=vocab_size, train=train, valid=valid, test=test, power_a=power_a)
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
        scores = {
            name: [self.score(predict(segment, values), segment)[0] for segment in splits["test"]]
            for name, predict in found.items()
        }
        return {name: sum(s.value * s.count for s in own) / sum(s.count for s in own) for name, own in scores.items()}
