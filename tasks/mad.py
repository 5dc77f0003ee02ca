"""MAD: six skills of a sequence mixer, each at a baseline and at changes of one factor that make it harder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks import _cache, _mad_laws, _mad_published
from tasks._mqar_data import token_dtype
from tasks._mqar_segments import whole
from tasks._skills import ACCURACY, Rows, Skill, as_batch, one_of
from tasks.base import IGNORE, Batch, PerToken, Reconstruction, Score, TaskSpec, Tokens

PROTOCOLS = "clean", "mad"
MACRO_BATCH = 128  # examples over which MAD's accuracy is taken


class MAD(Skill):
    """A skill of MAD; the laws stand in `tasks/_mad_laws.py`, their replay in `tasks/_mad_published.py`.

    Protocols:
        clean: ours. Drawn from (task, split, seed), splits disjoint, every question answerable, padding and constant
            tokens not trained on or scored, accuracy the mean over examples of the share of right answers.
        mad: the published draw of seed 12345, whatever `seed` is: test follows train in one stream. Accuracy is theirs:
            the mean over classes (those asked for or answered) within batches of 128 examples. `valid` is ours.

    Recall skills are trained on every next token; what is scored, and the loss on valid and test, are the values that
    can be known.

    Args:
        changes: settings that differ from the baseline in one factor, as mappings of keywords to values.
        setting: 0 is the baseline, k the k-th of `changes`; it stands in the id.

    Source: Poli et al. 2024, https://arxiv.org/abs/2403.17844; settings from the published configurations. Differs:
    their learning rate stays constant (a scheduler that is never called), ours falls.
    """

    answer_kind: ClassVar[type[PerToken] | type[Reconstruction]] = PerToken
    law: ClassVar[str]

    def _open(self, protocol: str, changes: Sequence[Mapping[str, Any]], setting: int, **base: Any) -> None:
        one_of("protocol", protocol, PROTOCOLS)
        whole("setting", setting, 0)
        if setting > len(changes):
            raise ValueError(f"setting must be at most {len(changes)}, the number of changes, got {setting}")
        change = dict(changes[setting - 1]) if setting else {}
        for key in change:
            one_of("key of changes", key, list(base))
        values = {**base, **change}
        for name, value in values.items():
            if name != "noise_share":
                whole(name, value, {"vocab_size": 4, "length": 4, "noise_vocab_size": 0}.get(name, 1))
        counts = {split: values.pop(f"num_{split}") for split in ("train", "valid", "test")}
        self._law, self._counts, self.seeded = values, counts, protocol == "clean"
        self._check(**values)
        self.protocol = protocol + "".join(f",{key}={value}" for key, value in change.items())
        self._published = protocol == "mad"
        self._settings = {split: [{"num_examples": count}] for split, count in counts.items()}
        vocab_size, shorter = values["vocab_size"], self.law in ("recall", "noisy_recall")
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=vocab_size),
            output=self.answer_kind(num_classes=vocab_size),
            length=values["length"] - shorter,
            causal=True,
            metrics=ACCURACY,
            primary="accuracy",
            chance=1 / self._choices(**values),
        )

    def _check(self, **law: Any) -> None:
        """Refuse a setting without data."""
        if law["length"] % 2:
            raise ValueError(f"length must be even, got {law['length']}; nearest: {law['length'] + 1}")

    @abstractmethod
    def _choices(self, **law: Any) -> int:
        """How many tokens can be an answer; sets `answers` where trivial solvers read them off the input."""

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        train = () if self.law in ("memorization", "compression", "selective_copying") else (split == "train",)
        return getattr(_mad_laws, self.law.replace("noisy_", ""))(rng, n, *train, **self._law, **setting)

    def _given(self, split: str, seed: int) -> list[Batch] | None:
        if not self._published:
            return None
        key = dict(task=self.id, version=self.version, law=self._law, counts=self._counts, split=split)
        dtype = token_dtype(self._law["vocab_size"], self._law["length"])

        def make() -> Rows:
            inputs, labels = _mad_published.draw(self.law, split, self._counts, self._law)
            return {"inputs": inputs.astype(dtype), "labels": labels.astype(dtype)}

        return [as_batch(_cache.arrays(key, make))]

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        scores = super().score(predictions, segment)
        if not self._published:
            return scores
        return [Score(metric="accuracy", value=macro(predictions, segment.targets), count=len(segment)), *scores[1:]]


def macro(predictions: Tensor, targets: Tensor) -> float:
    """Accuracy averaged over classes within batches of 128 examples, then over these by their size."""
    total = 0.0
    for said, true in zip(predictions.split(MACRO_BATCH), targets.split(MACRO_BATCH), strict=True):
        kept = true != IGNORE
        width = int(max(said[kept].max(), true[kept].max())) + 1
        right, asked, answered = (
            torch.bincount(part.long(), minlength=width).double()
            for part in (true[kept & (said == true)], true[kept], said[kept])
        )
        total += len(true) * float((right / asked.clamp_min(1))[asked + answered > 0].mean())
    return total / len(targets)


class InContextRecall(MAD):
    """Pairs `key value` under a mapping that each sequence makes up; every value of a key seen before is due."""

    version = 1
    name = "mad_recall"
    law = "recall"

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        length: int,
        num_train: int,
        num_valid: int,
        num_test: int,
        changes: Sequence[Mapping[str, float]] = (),
        setting: int = 0,
    ):
        self._open(
            protocol,
            changes,
            setting,
            vocab_size=vocab_size,
            length=length,
            num_train=num_train,
            num_valid=num_valid,
            num_test=num_test,
        )

    def _choices(self, **law: Any) -> int:
        clear = law["vocab_size"] - law.get("noise_vocab_size", 0)
        self.answers = clear // 2, clear
        return clear - clear // 2


class NoisyRecall(InContextRecall):
    """In-context recall where a pair is two tokens of noise with probability `noise_share`."""

    version = 1
    name = "mad_noisy_recall"
    law = "noisy_recall"

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        noise_vocab_size: int,
        noise_share: float,
        length: int,
        num_train: int,
        num_valid: int,
        num_test: int,
        changes: Sequence[Mapping[str, float]] = (),
        setting: int = 0,
    ):
        self._open(
            protocol,
            changes,
            setting,
            vocab_size=vocab_size,
            noise_vocab_size=noise_vocab_size,
            noise_share=noise_share,
            length=length,
            num_train=num_train,
            num_valid=num_valid,
            num_test=num_test,
        )

    def _check(self, **law: Any) -> None:
        super()._check(**law)
        if not 0 <= law["noise_share"] < 1:
            raise ValueError(f"noise_share must lie in [0, 1), got {law['noise_share']}; published: 0.2")
        if law["noise_vocab_size"] > law["vocab_size"] - 4 or (law["noise_share"] and not law["noise_vocab_size"]):
            raise ValueError(
                f"noise_vocab_size must leave four tokens of vocab_size={law['vocab_size']} and be at least 1 where "
                f"there is noise, got {law['noise_vocab_size']}; published: 16 of 32"
            )


class FuzzyRecall(MAD):
    """In-context recall whose keys and values are 1 to `max_motif` tokens long."""

    version = 1
    name = "mad_fuzzy_recall"
    law = "fuzzy_recall"

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        max_motif: int,
        length: int,
        num_train: int,
        num_valid: int,
        num_test: int,
        changes: Sequence[Mapping[str, float]] = (),
        setting: int = 0,
    ):
        self._open(
            protocol,
            changes,
            setting,
            vocab_size=vocab_size,
            max_motif=max_motif,
            length=length,
            num_train=num_train,
            num_valid=num_valid,
            num_test=num_test,
        )

    def _check(self, **law: Any) -> None:
        keys, motif = (law["vocab_size"] - 1) // 2, law["max_motif"]
        if motif > keys or (keys + 1) ** motif >= 2**62:
            raise ValueError(f"max_motif must be at most the {keys} keys of the vocabulary, got {motif}; published: 3")
        if law["length"] < 6 * motif:
            raise ValueError(f"length must be at least 6 * max_motif = {6 * motif}, got {law['length']}")

    def _choices(self, **law: Any) -> int:
        self.answers = (law["vocab_size"] - 1) // 2, law["vocab_size"] - 1
        return self.answers[1] - self.answers[0]


class Memorization(MAD):
    """`key insert`: a key has one value in all sequences, never shown, so that weights must hold it."""

    version = 1
    name = "mad_memorization"
    law = "memorization"

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        length: int,
        num_train: int,
        num_valid: int,
        num_test: int,
        changes: Sequence[Mapping[str, float]] = (),
        setting: int = 0,
    ):
        self._open(
            protocol,
            changes,
            setting,
            vocab_size=vocab_size,
            length=length,
            num_train=num_train,
            num_valid=num_valid,
            num_test=num_test,
        )

    def _choices(self, **law: Any) -> int:
        return (law["vocab_size"] - 1) // 2

    def _seeded(self, setting: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        rng = self._generator("mapping", f"seed={seed}")
        return {**setting, "mapping": _mad_laws.fixed_mapping(rng, self._law["vocab_size"])}


class Compression(MAD):
    """Random tokens, to be rebuilt all of them from the last position's state."""

    version = 1
    name = "mad_compression"
    law = "compression"
    answer_kind = Reconstruction

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        length: int,
        num_train: int,
        num_valid: int,
        num_test: int,
        changes: Sequence[Mapping[str, float]] = (),
        setting: int = 0,
    ):
        self._open(
            protocol,
            changes,
            setting,
            vocab_size=vocab_size,
            length=length,
            num_train=num_train,
            num_valid=num_valid,
            num_test=num_test,
        )

    def _check(self, **law: Any) -> None:
        pass

    def _choices(self, **law: Any) -> int:
        return law["vocab_size"] - 1


class SelectiveCopying(MAD):
    """Tokens among blanks, to be copied in order at the end; no answer is fed back."""

    version = 1
    name = "mad_selective_copying"
    law = "selective_copying"

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        num_copies: int,
        length: int,
        num_train: int,
        num_valid: int,
        num_test: int,
        changes: Sequence[Mapping[str, float]] = (),
        setting: int = 0,
    ):
        self._open(
            protocol,
            changes,
            setting,
            vocab_size=vocab_size,
            num_copies=num_copies,
            length=length,
            num_train=num_train,
            num_valid=num_valid,
            num_test=num_test,
        )

    def _check(self, **law: Any) -> None:
        if law["length"] <= 2 * law["num_copies"] + 1:
            raise ValueError(
                f"length must be above 2 * num_copies + 1, got length={law['length']} and "
                f"num_copies={law['num_copies']}; nearest: length={2 * law['num_copies'] + 2}"
            )

    def _choices(self, **law: Any) -> int:
        self.answers = 0, law["vocab_size"] - 2
        return law["vocab_size"] - 2
