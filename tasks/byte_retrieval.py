"""Pairs of papers byte by byte: the document retrieval of Long Range Arena."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from tasks import _cache, sources
from tasks._documents import BYTES, Alphabet
from tasks._pairs import PairClassification, pair_spec
from tasks.base import Batch

PROTOCOLS = ("fixed", "lra", "s4")
COLUMNS = {"label", "id1", "id2", "text1", "text2"}
CHARACTERS = 10_000  # that Long Range Arena reads of a text before it counts bytes
ROWS = 1000  # that are read at once


class ByteRetrieval(PairClassification):
    """Does one paper of the ACL Anthology cite the other: 147,086 pairs to learn from, 18,090 valid, 17,437 test.

    Protocols, in the id:

    - fixed: as lra, but a pair of the same two papers, in either order, stands in one split only: test goes before
      valid, and valid before train. A paper may still stand in several splits, in other pairs.
    - lra: the pairs as published; bytes of the first 10,000 characters, plus one; 0 pads.
    - s4: all characters of train, and an end mark.

    Args:
        protocol: fixed, lra or s4.
        max_length: bytes, or characters with the end mark, that are read of each text; published: 4,000.
        path: a copy of yours of the hub's data set, see `tasks.sources.table`.

    Raises:
        MissingData: at construction, when the data are not on this machine.

    Source: Radev et al. 2013, https://doi.org/10.1007/s10579-012-9211-2; Tay et al. 2020 (Long Range Arena),
    https://arxiv.org/abs/2011.04006, section 2.2.3, and https://github.com/google-research/long-range-arena; S4:
    https://github.com/state-spaces/s4. The ids are made once and mapped from disk.
    """

    version = 1
    name = "byte_retrieval"
    source = "aan"
    classes = ("unrelated", "cited")

    def __init__(self, *, protocol: str, max_length: int, path: str | None = None) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f'unknown protocol "{protocol}"; there are: {", ".join(PROTOCOLS)}')
        if max_length < 2:
            raise ValueError(f"max_length must be 2 or more, got {max_length}")
        sources.where("aan", path)
        self.kind, self.max_length, self.path = protocol, max_length, path
        self.protocol = f"{protocol}-{max_length}"
        self.spec = pair_spec(len(self._alphabet) if protocol == "s4" else BYTES, self.classes, max_length)

    def ids(self, text: str) -> np.ndarray:
        if self.kind == "s4":
            return self._alphabet.ids(text, self.max_length)
        return super().ids(text[:CHARACTERS])

    def decoded(self, ids: np.ndarray) -> str:
        return self._alphabet.text(ids) if self.kind == "s4" else super().decoded(ids)

    def examples(self, split: str) -> Batch:
        vocabulary = self._alphabet.characters if self.kind == "s4" else "bytes"
        key = dict(task=self.name, version=self.version, id=self.protocol, vocabulary=vocabulary, split=split)
        data = self._contents if self.kind == "fixed" else self._contents[split]
        arrays = _cache.arrays({**key, "data": data}, lambda: self._encoded(split))
        sides = [(arrays[f"ids{side}"], arrays[f"lengths{side}"]) for side in (1, 2)]
        return self.batch(sides, arrays["labels"])

    def _encoded(self, split: str) -> dict[str, np.ndarray]:
        rows = self._rows(split)
        labels = np.array(self._table(split)["label"], dtype=np.float64)[rows]
        if not np.isin(labels, (0, 1)).all():
            raise sources.MissingData("labels of aan must be 0 and 1; correct task.path")
        arrays: dict[str, np.ndarray] = {"labels": labels.astype(np.uint8)}
        for side in (1, 2):
            arrays[f"ids{side}"] = np.zeros((len(rows), self.max_length), np.int16)
            arrays[f"lengths{side}"] = np.zeros(len(rows), np.int32)
        start = 0
        for part in self._parts(split, rows):
            for side in (1, 2):
                ids, lengths = self.side(part[f"text{side}"])
                arrays[f"ids{side}"][start : start + len(ids)] = ids
                arrays[f"lengths{side}"][start : start + len(ids)] = lengths
            start += len(lengths)
        return arrays

    def _rows(self, split: str) -> np.ndarray:
        """Rows of the published split that are kept."""
        pairs = self._papers(split)
        if self.kind != "fixed":
            return np.arange(len(pairs))
        before = {"train": ("valid", "test"), "valid": ("test",), "test": ()}[split]
        taken = {pair for other in before for pair in self._papers(other)}
        return np.array([row for row, pair in enumerate(pairs) if pair not in taken], dtype=np.int64)

    def _papers(self, split: str) -> list[tuple[str, str]]:
        table = self._table(split)
        ids = zip(table["id1"], table["id2"], strict=True)
        return [(a, b) if a <= b else (b, a) for a, b in (map(str, pair) for pair in ids)]

    def _parts(self, split: str, rows: np.ndarray) -> Iterator[dict[str, list[str]]]:
        """Texts of some rows, a thousand at once."""
        table = self._table(split)
        for start in range(0, len(rows), ROWS):
            part = table[rows[start : start + ROWS]]
            yield {name: [text or "" for text in part[name]] for name in ("text1", "text2")}

    def _table(self, split: str) -> Any:
        if split not in self._tables:
            table = sources.table("aan", split, self.path)
            if missing := COLUMNS - set(table.column_names):
                raise sources.MissingData(f"aan has no columns {', '.join(sorted(missing))}; correct task.path")
            self._tables[split] = table
        return self._tables[split]

    @cached_property
    def _tables(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {split: sources.contents(self._table(split)) for split in ("train", "valid", "test")}

    @cached_property
    def _alphabet(self) -> Alphabet:
        """Of train, counted once on this machine."""
        key = dict(task=self.name, alphabet=self.max_length, data=self._contents["train"])

        def count() -> dict[str, np.ndarray]:
            parts = self._parts("train", np.arange(len(self._table("train"))))
            texts = (text for part in parts for side in ("text1", "text2") for text in part[side])
            alphabet = Alphabet.of(texts, self.max_length - 1, 1)
            return {"characters": np.array(list(map(ord, alphabet.characters)), dtype=np.uint32)}

        return Alphabet("".join(map(chr, _cache.arrays(key, count)["characters"])))
