"""What the six skills of MAD share: a baseline, changes of one factor, the published draw and its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks import _cache, _mad_published
from tasks._mqar_data import token_dtype
from tasks._mqar_segments import whole
from tasks._skill_rows import Rows, as_batch
from tasks._skills import Skill, one_of
from tasks.base import IGNORE, SPLITS, Batch, Score, Tokens

PROTOCOLS = "clean", "mad"
Changes = Sequence[Mapping[str, float]]
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

    law: ClassVar[Callable[..., Rows]]
    next_token: ClassVar[bool] = False  # trained on every next token
    own: Mapping[str, float] = {}  # settings that only this skill has, given before this constructor
    least: ClassVar = {"vocab_size": 4, "length": 4, "noise_vocab_size": 0}

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        length: int,
        num_train: int,
        num_valid: int,
        num_test: int,
        changes: Changes = (),
        setting: int = 0,
    ):
        one_of("protocol", protocol, PROTOCOLS)
        whole("setting", setting, 0)
        if setting > len(changes):
            raise ValueError(f"setting must be at most {len(changes)}, the number of changes, got {setting}")
        sizes = {f"num_{split}": count for split, count in zip(SPLITS, (num_train, num_valid, num_test), strict=True)}
        base = {"vocab_size": vocab_size, "length": length, **self.own, **sizes}
        change = dict(changes[setting - 1]) if setting else {}
        for key in change:
            one_of("key of changes", key, list(base))
        values: dict[str, Any] = {**base, **change}
        for name, value in values.items():
            if name != "noise_share":
                whole(name, value, self.least.get(name, 1))
        self.protocol = protocol + "".join(f",{key}={value}" for key, value in change.items())
        self.seeded, self.vocab_size = protocol == "clean", values["vocab_size"]
        self._counts = {split: values.pop(f"num_{split}") for split in SPLITS}
        self._law = values
        self._settings = {split: [{**values, "num_examples": count}] for split, count in self._counts.items()}
        self._check("", **values)
        self._specify(Tokens(vocab_size=self.vocab_size), self._length(**values))

    def _check(self, where: str, **law: Any) -> None:
        if law["length"] % 2:
            raise ValueError(f"length must be even, got {law['length']}; nearest: {law['length'] + 1}")

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        labels = {"train": split == "train"} if self.next_token else {}
        return self.law(rng, n, **labels, **setting)

    def _given(self, split: str, seed: int) -> list[Batch] | None:
        if self.seeded:
            return None
        key = dict(task=self.id, version=self.version, law=self._law, counts=self._counts, split=split)
        dtype = token_dtype(self.vocab_size, self._law["length"])

        def make() -> Rows:
            drawn = _mad_published.draw(self.name.removeprefix("mad_"), split, self._counts, self._law)
            return {name: array.astype(dtype) for name, array in zip(("inputs", "labels"), drawn, strict=True)}

        return [as_batch(_cache.arrays(key, make))]

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        scores = super().score(predictions, segment)
        if self.seeded:
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
