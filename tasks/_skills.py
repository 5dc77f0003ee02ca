"""What generated skills share: settings, splits that cannot meet, batches of one length, scores and trivial solvers."""

from __future__ import annotations

import difflib
import functools
import hashlib
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks import _skill_solvers as solver
from tasks._batches import of_one_length
from tasks._mqar_segments import whole
from tasks._recall_scores import by_group, power_range
from tasks._skill_rows import Rows, as_batch, part_of, repeated
from tasks.base import IGNORE, SPLITS, Batch, Metric, PerToken, Reconstruction, Score, Task, TaskSpec, Tokens, Vectors

Settings = Sequence[Mapping[str, int]]  # segments of a split
PARTS = {"train": (0, 5), "valid": (6, 6), "test": (7, 7)}  # of the eight parts that a hash cuts all sequences into
CHUNK = 2**18  # tokens drawn at a time; part of the data
ACCURACY = {
    "accuracy": Metric(unit="fraction", higher_is_better=True),
    "loss": Metric(unit="nats", higher_is_better=False),
}


class Skill(Task):
    """A task whose examples are drawn by a law, one segment per setting of a split.

    Splits are disjoint by construction: a hash of its inputs puts every possible sequence into one of eight parts;
    train takes what falls into six of them, valid and test take one each. What a segment holds depends on (task,
    split, seed, its place in the list) alone, and a shorter segment is the beginning of a longer one.

    Args:
        vocab_size: V.
        train, valid, test: segments {num_examples, and `keys`}.
        repeats: how often the input is read; labels stand in the last reading (Arora et al. 2024, JRT,
            https://arxiv.org/abs/2407.05483, where the prompt is repeated).

    Attributes:
        keys: what a setting has beside num_examples.
        least: the smallest vocab_size and values of keys, where 1 is too small.
        answer_kind: what is predicted, of as many classes as the vocabulary has; vectors have `choices` classes.
    """

    keys: ClassVar[tuple[str, ...]] = ("length",)
    least: ClassVar[Mapping[str, int]] = {}
    answer_kind: ClassVar[type[PerToken] | type[Reconstruction]] = PerToken
    repeats: int = 1
    _settings: Mapping[str, Sequence[Mapping[str, Any]]]

    def __init__(self, *, vocab_size: int, train: Settings, valid: Settings, test: Settings, repeats: int = 1):
        whole("vocab_size", vocab_size, self.least.get("vocab_size", 1))
        whole("repeats", repeats, 1)
        self.vocab_size, self.repeats = vocab_size, repeats
        self._read(train, valid, test, Tokens(vocab_size=vocab_size))

    def _read(self, train: Settings, valid: Settings, test: Settings, inputs: Tokens | Vectors) -> None:
        """Take the settings, each of which `_check` may refuse, and say what goes in and out."""
        self._settings = read_settings(dict(train=train, valid=valid, test=test), self.keys, self.least)
        every = [(f"{split}[{i}].", s) for split, own in self._settings.items() for i, s in enumerate(own)]
        for where, setting in every:
            self._check(where, **setting)
        self._specify(inputs, self.repeats * max(self._length(**setting) for _, setting in every))

    def _specify(self, inputs: Tokens | Vectors, length: int) -> None:
        classes = inputs.vocab_size if isinstance(inputs, Tokens) else self.choices
        self.spec = TaskSpec(
            inputs=inputs,
            output=self.answer_kind(num_classes=classes),
            length=length,
            causal=True,
            metrics=ACCURACY,
            primary="accuracy",
            chance=1 / self.choices,
        )

    def _check(self, where: str, **setting: Any) -> None:
        """Refuse a setting without data; `where` stands before the names of its keys, such as "train[0]."."""

    def _length(self, **setting: Any) -> int:
        """Positions of an example read once."""
        return setting["length"]

    @property
    def answers(self) -> tuple[int, int] | None:
        """The tokens (first, last + 1) that trivial solvers choose from; None: they are not tokens of the input."""
        return None

    @property
    def choices(self) -> int:
        """How many answers there are."""
        low, high = self.answers or (0, self.vocab_size)
        return high - low

    @property
    def id(self) -> str:
        return super().id + (f",repeats={self.repeats}" if self.repeats > 1 else "")

    @abstractmethod
    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        """n examples of a segment; `content` [n, C] stands for the inputs in the hash where those are not integers."""

    def _given(self, split: str, seed: int) -> list[Batch] | None:
        """The segments of a published draw; None: they are to be drawn by `_draw`."""
        return None

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        given = self._given(split, seed)
        if given is None:
            given = [self._segment(split, seed, i) for i in range(len(self._settings[split]))]
        return [repeated(batch, self.repeats) for batch in given]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch, every example once, in batches of one length; in random order unless the generator is None."""
        whole("batch_size", batch_size, 1)
        return of_one_length(segments, batch_size, generator)

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Accuracy of predictions [N, P]: the mean over examples of each example's share of right answers.

        Per example (count: examples) by every slice [N], per answer by every slice [N, P]; `distance`, `order` and the
        like in ranges of powers of two, `class` by name.
        """
        shape = segment.targets.shape
        if predictions.shape != shape:
            raise ValueError(f"predictions must be [N, P] = {list(shape)}, got {list(predictions.shape)}")
        labelled = segment.targets != IGNORE
        correct = (predictions == segment.targets) & labelled
        per_example = correct.sum(1).double() / labelled.sum(1).clamp_min(1)
        scores = [Score(metric="accuracy", value=per_example.mean().item(), count=len(segment))]
        for name, values in segment.slices.items():
            words = functools.partial(self._label, name)
            if values.dim() == 1:
                scores += by_group(name, values.long(), per_example, words)
                continue
            group, right = values[labelled].long(), correct[labelled].double()
            if name == "class":
                scores += by_group(name, group, right, words)
            else:
                powers = 2 ** torch.arange(32)
                scores += by_group(name, torch.bucketize(group, powers, right=True), right, power_range)
        return scores

    def _label(self, name: str, value: int) -> str:
        """A slice's value in words."""
        return str(value)

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """Accuracy on `test` of those who do not understand the task, by name."""
        fitted = solver.majority(splits["train"], self.answers)
        found: dict[str, Callable[[Batch], Tensor]] = {"majority": lambda segment: fitted.expand(segment.targets.shape)}
        if self.answers is not None:
            found["most_frequent_answer"] = lambda segment: solver.most_frequent(segment, self.answers)
            found["latest_answer"] = lambda segment: solver.latest(segment, self.answers)
        found |= self._solvers()
        return {name: solver.accuracy(self, predict, splits["test"]) for name, predict in found.items()}

    def _solvers(self) -> dict[str, Callable[[Batch], Tensor]]:
        """Trivial solvers of one task, segment -> predictions [N, P]."""
        return {}

    def _generator(self, purpose: str, *parts: object) -> np.random.Generator:
        text = f"{self.name} {purpose} {' '.join(map(str, parts))}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "little"))

    def _segment(self, split: str, seed: int, index: int) -> Batch:
        setting = dict(self._settings[split][index])
        count = setting.pop("num_examples")
        rng = self._generator("segment", split, f"seed={operator.index(seed)}", f"index={index}")
        low, high = PARTS[split]
        parts: list[Rows] = []
        have, fruitless, n = 0, 0, 64
        while have < count:
            rows = self._draw(rng, n, split, **self._seeded(setting, seed))
            n = min(2 * n, max(64, CHUNK // rows["inputs"][0].size))  # grows whatever `count` is
            part = part_of(rows.pop("content", rows["inputs"]))
            keep = np.flatnonzero((part >= low) & (part <= high))[: count - have]
            fruitless = 0 if len(keep) else fruitless + 1
            if fruitless == 100:
                raise ValueError(
                    f"{self.id} has too few different sequences to give {split} its own, at {setting}; "
                    "type a larger length or vocabulary"
                )
            parts.append({name: array[keep] for name, array in rows.items()})
            have += len(keep)
        return as_batch({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _seeded(self, setting: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        """The setting of a segment with what all splits of a seed share."""
        return setting


def one_of(name: str, value: object, valid: Sequence[str]) -> None:
    """Refuse an unknown word."""
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)[0]
        raise ValueError(f'unknown {name} "{value}"; nearest: {near}. All of them: {", ".join(valid)}')


def read_settings(
    splits: Mapping[str, object], names: Sequence[str], least: Mapping[str, int] | None = None
) -> dict[str, list[dict[str, int]]]:
    """Segments of every split, each a mapping of `names` and num_examples to whole numbers.

    Raises:
        ValueError: a split that is no list, a key that is missing or unknown, a number below `least` (1).
    """
    names = [*names, "num_examples"]
    example = "{" + ", ".join(f"{name}: {1000 if name == 'num_examples' else 16}" for name in names) + "}"
    settings: dict[str, list[dict[str, int]]] = {}
    for split, given in splits.items():
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise ValueError(f"{split} must be a list of segments such as [{example}], got {given!r}")
        for i, item in enumerate(given):
            where = f"{split}[{i}]"
            if not isinstance(item, Mapping) or set(item) - set(names) or set(names) - set(item):
                raise ValueError(f"{where} must have the keys of {example}, got {item!r}")
            for name in names:
                whole(f"{where}.{name}", item[name], (least or {}).get(name, 1))
            settings.setdefault(split, []).append(dict(item))
    return settings
