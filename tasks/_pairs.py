"""Pairs of texts with one class: what the dual encoder's tasks share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks._classification import Classification, classification_spec, labelled
from tasks._documents import BYTES, PAD, byte_ids, padded, spelled
from tasks.base import Batch, TaskSpec, Tokens

FEATURES, ROWS = 2**16, 2048  # hashed features; pairs whose features are in memory at a time


def pair_spec(vocab_size: int, classes: Sequence[str], length: int) -> TaskSpec:
    """The spec of a task of this kind: inputs and context of one vocabulary and one length."""
    tokens = Tokens(vocab_size=vocab_size)
    spec = classification_spec(tokens, classes, length)
    return dataclasses.replace(spec, context=tokens, context_length=length)


class PairClassification(Classification):
    """Two texts as inputs and context, the first `max_length` bytes of each; see `bench.backbones.dual_encoder`.

    Slices by length are those of the longer text.
    """

    max_length: int

    def ids(self, text: str) -> np.ndarray:
        """What a model reads of a text, int16."""
        return byte_ids(text, self.max_length)

    def decoded(self, ids: np.ndarray) -> str:
        """The text that ids [L] stand for."""
        return (ids[ids != PAD] - 1).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def spelled(self, tokens: Tensor) -> list[str] | None:
        return spelled(tokens.tolist()) if self.spec.inputs == Tokens(vocab_size=BYTES) else None

    def batch(self, sides: Sequence[tuple[np.ndarray, np.ndarray]], labels: np.ndarray) -> Batch:
        """A split of padded ids [N, L] with their lengths [N], first texts and second ones."""
        (first, first_length), (second, second_length) = sides
        one, other = labelled(first, labels, first_length), labelled(second, labels, second_length)
        longer = torch.from_numpy(np.maximum(first_length, second_length))
        return dataclasses.replace(one, context=other.inputs, context_mask=other.key_mask, slices={"length": longer})

    def side(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Padded ids of texts, and their lengths."""
        return padded([self.ids(text) for text in texts], self.max_length)

    def texts(self, splits: Mapping[str, Batch]) -> dict[str, list[list[str]]]:
        """The first and the second texts of each split, as a model reads them."""
        return {
            split: [
                [self.decoded(row) for row in side.numpy()] for side in (part.inputs, part.context) if side is not None
            ]
            for split, part in splits.items()
        }

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, Any]]:
        """What the two texts share, and each of them alone: a model of one side shows what the labels betray."""
        texts = self.texts(splits)
        words = _vectors(texts, analyzer="word", token_pattern=r"\w+")
        parts = _overlaps(texts, analyzer="char_wb", ngram_range=(3, 4))
        overlap = {
            split: np.column_stack([_overlap(*words[split]), parts[split], _sizes(*texts[split])]) for split in splits
        }
        return {
            "linear, overlap": overlap,
            "linear, first alone": {split: words[split][0] for split in splits},
            "linear, second alone": {split: words[split][1] for split in splits},
        }


def exchanged(lent: np.ndarray, wrong: Callable[[int, int], bool]) -> np.ndarray | None:
    """A permutation close to `lent` in which no place holds what it must not.

    Where one does, it swaps with the nearest place with which both are right.

    Args:
        lent: a permutation [N].
        wrong: whether a place must not hold a value.

    Returns:
        [N]; None: some place has nobody to swap with.
    """
    lent = lent.copy()
    for i in range(len(lent)):
        if not wrong(i, lent[i]):
            continue
        near = (j for step in range(1, len(lent)) for j in (i - step, i + step) if 0 <= j < len(lent))
        found = next((j for j in near if not wrong(i, lent[j]) and not wrong(j, lent[i])), None)
        if found is None:
            return None
        lent[i], lent[found] = lent[found], lent[i]
    return lent


def _vectors(texts: Mapping[str, Sequence[Sequence[str]]], **options: Any) -> dict[str, list[Any]]:
    """Rows of length one, weighted by tf-idf, of both sides of each split; hashed, so that long texts need no table."""
    from sklearn.feature_extraction.text import TfidfTransformer

    hashed = _hashed(options)
    counts = {split: [hashed.transform(side) for side in sides] for split, sides in texts.items()}
    weights = TfidfTransformer(sublinear_tf=True).fit(counts["train"][0])
    return {split: [weights.transform(side) for side in sides] for split, sides in counts.items()}


def _overlaps(texts: Mapping[str, Sequence[Sequence[str]]], **options: Any) -> dict[str, np.ndarray]:
    """`_overlap` of the `_vectors` of each split, some pairs at a time: all of them may not fit into memory."""
    from sklearn.preprocessing import normalize

    hashed = _hashed(options)
    first = texts["train"][0]
    seen = np.zeros(FEATURES, np.int64)
    for start in range(0, len(first), ROWS):
        seen += np.bincount(hashed.transform(first[start : start + ROWS]).indices, minlength=FEATURES)
    rarity = np.log((1 + len(first)) / (1 + seen)) + 1

    def weighted(side: Sequence[str]) -> Any:
        counts = hashed.transform(side)
        counts.data = (np.log(counts.data) + 1) * rarity[counts.indices]
        return normalize(counts, copy=False)

    return {
        split: np.concatenate(
            [_overlap(*(weighted(side[i : i + ROWS]) for side in sides)) for i in range(0, len(sides[0]), ROWS)]
        )
        for split, sides in texts.items()
    }


def _hashed(options: Mapping[str, Any]) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=FEATURES, norm=None, alternate_sign=False, **options)


def matched(texts: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, Any]:
    """Which words both texts have, and which only one of them: split -> sparse [N, 2F], for words of two texts or more.

    The product and the absolute difference of two bags of words.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    def words(pair: tuple[str, str]) -> list[str]:
        one, other = (set(re.findall(r"\w+", text)) for text in pair)
        return [*(f"both {word}" for word in one & other), *(f"one {word}" for word in one ^ other)]

    vectors = CountVectorizer(analyzer=words, min_df=2).fit(zip(*texts["train"], strict=True))
    return {split: vectors.transform(zip(*sides, strict=True)) for split, sides in texts.items()}


def _overlap(first: Any, second: Any) -> np.ndarray:
    """Cosine, and the number of shared features, of every pair: [N, 2]."""
    cosine = np.asarray(first.multiply(second).sum(1)).ravel()
    shared = np.asarray((first > 0).multiply(second > 0).sum(1)).ravel()
    return np.column_stack([cosine, np.log1p(shared)])


def _sizes(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Logarithms of both lengths and the size of their difference: [N, 3]."""
    one, other = (np.log1p([len(text) for text in side]) for side in (first, second))
    return np.column_stack([one, other, np.abs(one - other)])
