"""Film reviews byte by byte: the text task of Long Range Arena."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from tasks import _cache, _disjoint, sources
from tasks._classification import classification_spec
from tasks._documents import BYTES, Alphabet, ByteDocuments
from tasks.base import Tokens

PROTOCOLS = ("fixed", "lra", "s4")
NEAR = 0.6  # share of common character 5-grams
MIN_COUNT = 15  # of a character in S4's alphabet


class ByteText(ByteDocuments):
    """Is a review of IMDB positive: its first bytes, 25,000 reviews to learn from and 25,000 to test.

    Protocols, in the id:

    - fixed: a tenth of the published train split, each class in the same share, becomes valid; reviews that nearly
      equal one of test are left out, and near duplicates stand on one side of the cut. Ids are bytes plus one, 0 pads.
    - lra: valid is the test split itself, as published: what is chosen on valid is chosen on test. Ids as above.
    - s4: characters that occur 15 times or more, an end mark; valid is the test split itself, too.

    Args:
        protocol: fixed, lra or s4.
        max_length: bytes, or characters with the end mark, that are read of a review: its first ones. Long Range
            Arena's paper tries 1,000 to 4,000 and prints the best test score; its code has 1,000, S4 4,096.
        path: a copy of yours of the hub's data set, see `tasks.sources.table`.

    Raises:
        MissingData: at construction, when the data are not on this machine.

    Source: Maas et al. 2011, https://aclanthology.org/P11-1015; Tay et al. 2020 (Long Range Arena),
    https://arxiv.org/abs/2011.04006, section 2.2.2, and https://github.com/google-research/long-range-arena; S4:
    https://github.com/state-spaces/s4. Differs: they report on test what they chose on test; with `fixed` do not.
    """

    version = 1
    name = "byte_text"
    source = "imdb"
    classes = ("negative", "positive")

    def __init__(self, *, protocol: str, max_length: int, path: str | None = None) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f'unknown protocol "{protocol}"; there are: {", ".join(PROTOCOLS)}')
        if max_length < 2:
            raise ValueError(f"max_length must be 2 or more, got {max_length}")
        sources.where("imdb", path)
        self.kind, self.max_length, self.path = protocol, max_length, path
        self.protocol = f"{protocol}-{max_length}" + ("" if protocol == "fixed" else "-valid-is-test")
        size = len(self._alphabet) if protocol == "s4" else BYTES
        self.spec = classification_spec(Tokens(vocab_size=size), self.classes, max_length)

    def documents(self, split: str) -> tuple[list[str], np.ndarray]:
        if self.kind != "fixed":
            return self._published("train" if split == "train" else "test")
        texts, labels = self._published("test" if split == "test" else "train")
        if split == "test":
            return texts, labels
        rows = self._cut[split]
        return [texts[row] for row in rows], labels[rows]

    def ids(self, text: str) -> np.ndarray:
        return self._alphabet.ids(text, self.max_length) if self.kind == "s4" else super().ids(text)

    def decoded(self, ids: np.ndarray) -> str:
        if self.kind != "s4":
            return super().decoded(ids)
        return self._alphabet.text(ids)

    @cached_property
    def _alphabet(self) -> Alphabet:
        return Alphabet.of(self._published("train")[0], self.max_length - 1, MIN_COUNT)

    def _published(self, split: str) -> tuple[list[str], np.ndarray]:
        if split not in self._read:
            rows = sources.table("imdb", split, self.path)
            if not {"text", "label"} <= set(rows.column_names):
                raise sources.MissingData(
                    f"imdb must have columns text and label, got {', '.join(rows.column_names)}; correct task.path"
                )
            self._read[split] = rows["text"][:], np.array(rows["label"], dtype=np.int64)
        return self._read[split]

    @cached_property
    def _read(self) -> dict[str, tuple[list[str], np.ndarray]]:
        return {}

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        """Rows of the published train split that are train and valid; comparing all reviews takes minutes, once."""
        texts, labels = self._published("train")
        tested, _ = self._published("test")
        data = hashlib.sha256("\0".join([*texts, *tested]).encode("utf-8", "surrogateescape") + labels.tobytes())
        key = dict(task=self.name, version=self.version, near=NEAR, data=data.hexdigest())

        def cut() -> dict[str, np.ndarray]:
            groups = _disjoint.groups_of(len(texts) + len(tested), _disjoint.text_pairs([*texts, *tested], NEAR))
            kept = np.flatnonzero(~np.isin(groups[: len(texts)], groups[len(texts) :]))
            parts = _disjoint.stratified(labels[kept], {"train": 0.9, "valid": 0.1}, groups=groups[kept])
            return {split: kept[rows] for split, rows in parts.items()}

        return _cache.arrays(key, cut)
