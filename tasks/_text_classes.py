"""Classification of short texts: near duplicates removed, one stratified cut, bytes or words as tokens."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tasks import _cache, _disjoint
from tasks._classification import Classification, classification_spec, labelled
from tasks._documents import spelled
from tasks.base import SPLITS, Batch, Tokens

PAD, UNKNOWN = 0, 1  # token ids; data ids follow, bytes from 1 and words from 2
SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}


class TextClassification(Classification):
    """Texts of a source cut to `length` tokens, 70 % train, 10 % valid and 20 % test, each class in the same share.

    Of texts that are equal but for case and punctuation, or whose character 5-grams overlap by `near` or more, only
    the first is kept, before the cut.

    Args:
        length: tokens that are read of a text, its first ones; shorter texts are padded under a mask.
        num_words: None: tokens are bytes of UTF-8, ids 1 .. 256. Otherwise words and punctuation marks in lower case,
            the commonest `num_words` of train, ids 2 ..; any other is unknown.
        path: a copy of yours of the source's file, or of the folder or wheel it is in.

    Class attributes:
        near: Jaccard index from which two texts are near duplicates.
    """

    near: ClassVar[float]

    def __init__(self, *, length: int, num_words: int | None = None, path: str | None = None) -> None:
        if length < 1 or (num_words is not None and num_words < 1):
            raise ValueError(
                f"length and num_words must be 1 or more, got {length} and {num_words}; num_words may be null"
            )
        self.length, self.num_words, self.path = length, num_words, path
        self.protocol = f"bytes-{length}" if num_words is None else f"words-{length}"
        self.vocab_size = 257 if num_words is None else 2 + num_words
        self.spec = classification_spec(Tokens(vocab_size=self.vocab_size), self.classes, length)

    @abstractmethod
    def records(self) -> tuple[list[str], np.ndarray]:
        """All texts and the numbers of their classes."""

    def examples(self, split: str) -> Batch:
        texts, labels = self._records
        rows = self._cut[split]
        ids = [self._encode(texts[row])[: self.length] for row in rows]
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        inputs = np.full((len(rows), self.length), PAD, dtype=np.int16)
        for place, row in zip(inputs, ids, strict=True):
            place[: len(row)] = row
        return labelled(inputs, labels[rows], lengths)

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, Any]]:
        """Words and pairs of words, and character n-grams inside words, weighted by tf-idf; of what a model reads."""
        texts = {split: [self.decoded(row) for row in part.inputs.numpy()] for split, part in splits.items()}
        features = {"linear, words": _tf_idf(texts, analyzer="word", token_pattern=WORD, ngram_range=(1, 2))}
        if self.num_words is None:
            features["linear, characters"] = _tf_idf(texts, analyzer="char_wb", ngram_range=(1, 4))
        return features

    @cached_property
    def _records(self) -> tuple[list[str], np.ndarray]:
        return self.records()

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        """Rows of each split; comparing all texts takes seconds, so they are remembered on this machine."""
        texts, labels = self._records
        data = hashlib.sha256("\0".join(texts).encode() + labels.tobytes()).hexdigest()
        key = dict(task=self.name, version=self.version, near=self.near, shares=SHARES, data=data)
        return _cache.arrays(key, lambda: distinct_cut(texts, labels, self.near))

    @cached_property
    def _words(self) -> list[str]:
        texts, _ = self._records
        counts = Counter(word for row in sorted(self._cut["train"]) for word in re.findall(WORD, texts[row].casefold()))
        return [word for word, _ in counts.most_common(self.num_words)]  # ties: the first to occur

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words, UNKNOWN + 1)}

    def _encode(self, text: str) -> np.ndarray:
        if self.num_words is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int16) + 1
        return np.array([self._ids.get(word, UNKNOWN) for word in re.findall(WORD, text.casefold())], dtype=np.int16)

    def spelled(self, tokens: Tensor) -> list[str]:
        if self.num_words is None:
            return spelled(tokens.tolist())
        known = {PAD: "", UNKNOWN: " …"}
        return [known[i] if i in known else f" {self._words[i - UNKNOWN - 1]}" for i in tokens.tolist()]

    def decoded(self, ids: np.ndarray) -> str:
        """The text that ids [L] stand for, as the linear floors read it."""
        ids = ids[ids != PAD]
        if self.num_words is None:
            return bytes((ids - 1).astype(np.uint8)).decode("utf-8", "replace")
        return " ".join("unknown" if i == UNKNOWN else self._words[i - UNKNOWN - 1] for i in ids)


WORD = r"[^\W_]+|[^\w\s]"  # a run of letters and digits, or a punctuation mark


def distinct_cut(texts: Sequence[str], labels: np.ndarray, near: float) -> dict[str, np.ndarray]:
    """Rows of each split, of the texts that remain when near duplicates are removed."""
    kept = _disjoint.distinct(len(texts), _disjoint.text_pairs(texts, near))
    cut = _disjoint.stratified(labels[kept], SHARES)
    return {split: kept[cut[split]] for split in SPLITS}


def _tf_idf(texts: Mapping[str, Sequence[str]], **options: Any) -> dict[str, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(lowercase=True, min_df=2, sublinear_tf=True, **options).fit(texts["train"])
    return {split: vectors.transform(part) for split, part in texts.items()}
