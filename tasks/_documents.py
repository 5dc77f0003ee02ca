"""Text of many sentences, read byte by byte or character by character, one class per document."""

from __future__ import annotations

import codecs
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tasks._classification import Classification, labelled
from tasks.base import Batch, Tokens

PAD, UNKNOWN, END = 0, 1, 2  # ids; bytes are 1 .. 256, and characters from 3
BYTES = 257  # ids where tokens are bytes


def byte_ids(text: str, length: int) -> np.ndarray:
    """The first `length` bytes of a text, each plus one, int16; an empty text is one pad."""
    ids = np.frombuffer(text[:length].encode("utf-8", "surrogateescape")[:length], np.uint8).astype(np.int16) + 1
    return ids if len(ids) else np.array([PAD], np.int16)


def spelled(ids: Iterable[int]) -> list[str]:
    """The characters of byte ids, each at its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes([i - 1])) if i != PAD else "" for i in ids]


class Alphabet:
    """Ids of characters: 0 pads, 1 is any other, 2 the end of a text, 3 the first of `characters`."""

    def __init__(self, characters: str):
        self.characters = characters
        self._ids = {character: END + 1 + i for i, character in enumerate(characters)}

    @classmethod
    def of(cls, texts: Iterable[str], length: int, min_count: int) -> Alphabet:
        """Characters that occur `min_count` times or more, the commonest first: S4's vocabulary.

        Args:
            texts: what is counted.
            length: characters of a text that count, its first ones.
            min_count: rarer ones are left out.

        Source: https://github.com/state-spaces/s4 (its loader of Long Range Arena), by way of torchtext.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text[:length])
        common = [character for character, count in counts.items() if count >= min_count]
        return cls("".join(sorted(common, key=lambda character: (-counts[character], character))))

    def __len__(self) -> int:
        """Ids there are."""
        return END + 1 + len(self.characters)

    def ids(self, text: str, length: int) -> np.ndarray:
        """The first `length` - 1 characters and the end, int16."""
        return np.array([*(self._ids.get(c, UNKNOWN) for c in text[: length - 1]), END], dtype=np.int16)

    def text(self, ids: np.ndarray) -> str:
        """What ids stand for; ? for an unknown character."""
        return "".join(self.characters[i - END - 1] if i > END else "?" for i in ids if i not in (PAD, END))


def padded(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a matrix [N, width], zeros on their right, and their lengths [N]."""
    matrix = np.full((len(rows), width), PAD, dtype=np.int16)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return matrix, np.array([len(row) for row in rows], dtype=np.int32)


class ByteDocuments(Classification):
    """Documents as the first `max_length` bytes of each; what the tasks of long texts share.

    A subclass sets `max_length`, `protocol` and `spec`, and gives `documents`.
    """

    max_length: int

    @abstractmethod
    def documents(self, split: str) -> tuple[Sequence[str], np.ndarray]:
        """Texts and classes of a split."""

    def ids(self, text: str) -> np.ndarray:
        """What a model reads of a text, int16."""
        return byte_ids(text, self.max_length)

    def decoded(self, ids: np.ndarray) -> str:
        """The text that ids [L] without padding stand for."""
        return (ids[ids != PAD] - 1).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def spelled(self, tokens: Tensor) -> list[str] | None:
        return spelled(tokens.tolist()) if self.spec.inputs == Tokens(vocab_size=BYTES) else None

    def examples(self, split: str) -> Batch:
        texts, labels = self.documents(split)
        inputs, lengths = padded([self.ids(text) for text in texts], self.max_length)
        return labelled(inputs, labels, lengths)

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, Any]]:
        """Words and pairs of words, and character n-grams, weighted by tf-idf; of what a model reads."""
        texts = {split: [self.decoded(row) for row in part.inputs.numpy()] for split, part in splits.items()}
        return {"linear, words": words(texts), "linear, characters": characters(texts)}


def words(texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Words and pairs of words, weighted by tf-idf: split -> sparse [N, F]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(min_df=2, sublinear_tf=True, ngram_range=(1, 2)).fit(texts["train"])
    return {split: vectors.transform(part) for split, part in texts.items()}


def characters(texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Runs of one to four characters, hashed, so that millions of them need no table, and weighted by tf-idf."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    hashed = HashingVectorizer(analyzer="char", ngram_range=(1, 4), n_features=2**16, norm=None, alternate_sign=False)
    counts = {split: hashed.transform(part) for split, part in texts.items()}
    weights = TfidfTransformer(sublinear_tf=True).fit(counts["train"])
    return {split: weights.transform(part) for split, part in counts.items()}
