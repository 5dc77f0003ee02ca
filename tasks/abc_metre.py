"""The metre of a folk tune from its notes alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tasks import _abc, _cache, _disjoint
from tasks._classification import Classification, classification_spec, labelled
from tasks.base import SPLITS, Batch, Tokens
from tasks.sources import MissingData, member, members, where

SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}
FOLDER, BOOKS = "music21/corpus/", ("airdsAirs", "essenFolksong", "miscFolk", "oneills1850", "ryansMammoth")
METRES = {"2/4": "2/4", "3/4": "3/4", "3/8": "3/8", "6/8": "6/8", "9/8": "9/8"} | dict.fromkeys(
    ("4/4", "C", "2/2", "C|"), "4/4"
)
NEAR, WIDTH = 0.5, 6  # Jaccard index of runs of six notes from which two tunes are variants of each other
LOWEST, HIGHEST = 48, 88  # MIDI; what is outside counts as the nearest
VALUES = sorted(  # 32nd to breve: plain, dotted, in a triplet
    {round(_abc.WHOLE * 2**k * factor) for k in range(-5, 2) for factor in (1, 1.5, 2 / 3)}
)
PAD, REST, PITCH = 0, 1, 2  # ids; then the pitches, the values and any other duration
VALUE = PITCH + HIGHEST - LOWEST + 1
OTHER = VALUE + len(VALUES)


class AbcMetre(Classification):
    """Is a tune in 2/4, 3/4, 3/8, 4/4, 6/8 or 9/8? A note is two tokens, its pitch and its duration.

    11,605 tunes of five collections. Nothing but sounding notes is left of the notation: no header, no bar lines,
    spaces (beams), line ends, repeats or accidentals, which tell a bar; tied notes, which often cross a bar line, are
    one note, rests in a row one rest. Durations are parts of a whole note, whatever unit the file counts in (which
    goes with the metre); that a tune is written in eighths or in quarters is a matter of its notes and can be seen.
    Common time, cut time and 2/2 count as 4/4: their bars are as long, and which was written depends on the book.

    Tunes with the same intervals and durations are one. Tunes that share a title or, in the Essen collection, a number
    of its index of variants, or half of their runs of six notes in any key, are on one side of the cut (70 % train,
    10 % valid, 20 % test). The rarest metre is 9/8, with 1 % of the tunes, hence macro F1 beside accuracy.

    Args:
        num_notes: notes that are read of a tune, its first ones.
        path: a copy of yours: the wheel of music21, or a folder with .abc files.

    Source: the corpus of music21, https://www.music21.org: Essen Folksong Collection (Schaffrath), O'Neill, Aird, Ryan,
    and two collections by others. The task is ours.
    """

    version = 1
    name = "abc_metre"
    source = "folk_tunes"
    classes = ("2/4", "3/4", "3/8", "4/4", "6/8", "9/8")

    def __init__(self, *, num_notes: int = 64, path: str | None = None) -> None:
        if num_notes < 1:
            raise ValueError(f"num_notes must be 1 or more, got {num_notes}")
        self.num_notes, self.path = num_notes, path
        self.protocol = f"notes-{num_notes}"
        self.spec = classification_spec(Tokens(vocab_size=OTHER + 1), self.classes, 2 * num_notes)

    def examples(self, split: str) -> Batch:
        stored = self._data
        rows = stored[split]
        lengths = np.minimum(stored["lengths"][rows], self.spec.length)
        inputs = np.zeros((len(rows), self.spec.length), dtype=np.uint8)
        for place, row, length in zip(inputs, rows, lengths, strict=True):
            place[:length] = stored["tokens"][stored["starts"][row] :][:length]
        return labelled(inputs, stored["labels"][rows], lengths)

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, Any]]:
        """Counts of runs of one to four durations, and of one or two tokens, weighted by tf-idf."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        text = {s: [" ".join(f"t{i}" for i in row if i) for row in part.inputs.numpy()] for s, part in splits.items()}
        beats = {s: [" ".join(row.split()[1::2]) for row in rows] for s, rows in text.items()}
        floors = {}
        for name, rows, longest in (("linear, durations", beats, 4), ("linear, notes", text, 2)):
            vectors = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, longest), min_df=3, sublinear_tf=True)
            vectors.fit(rows["train"])
            floors[name] = {split: vectors.transform(part) for split, part in rows.items()}
        return floors

    @cached_property
    def _data(self) -> dict[str, np.ndarray]:
        """Tokens of all tunes on end, where each starts, its length and label, and the rows of each split."""
        files = _files(self.path)
        digest = hashlib.sha256("\0".join(files).encode()).hexdigest()
        return _cache.arrays(dict(task=self.name, version=self.version, data=digest), lambda: _tunes(files))


def _files(path: str | None) -> list[str]:
    """The collections' .abc files, sorted by name."""
    if path is not None and where("folk_tunes", path).is_dir():
        found = [file.read_bytes() for file in sorted(Path(path).expanduser().rglob("*.abc"))]
    else:
        names = [name for book in BOOKS for name in members("folk_tunes", f"{FOLDER}{book}/", path)]
        found = [member("folk_tunes", name, path) for name in names if name.endswith(".abc")]
    if not found:
        raise MissingData("no .abc files there; type python -m bench.data fetch folk_tunes, or correct task.path")
    return [content.decode("utf-8", "replace") for content in found]


def _tunes(files: Sequence[str]) -> dict[str, np.ndarray]:
    """What `_data` keeps, of tunes in one voice that have one of the metres throughout."""
    notes, labels, kinds, seen = [], [], [], set()
    for number, text in enumerate(files):
        for tune in _abc.tunes(text):
            metre = tune.header.get("M", [])
            if len(metre) != 1 or metre[0] not in METRES or "V" in tune.header or "[M:" in tune.body:
                continue
            try:
                sounding = np.array(tune.notes(), dtype=np.int64).reshape(-1, 2)
            except ValueError:
                continue  # no unit length, or the key of a bagpipe
            if len(sounding) < 8 or (melody := _melody(sounding)) in seen:
                continue
            seen.add(melody)
            notes.append(sounding)
            labels.append(AbcMetre.classes.index(METRES[metre[0]]))
            kinds.append((melody, _names(tune, number)))
    melodies = [melody for melody, _ in kinds]
    pairs = [_disjoint.text_pairs(melodies, NEAR, width=WIDTH, normalise=str)]
    first: dict[str, int] = {}
    pairs += [np.array([[first.setdefault(name, row), row]]) for row, (_, names) in enumerate(kinds) for name in names]
    groups = _disjoint.groups_of(len(notes), np.concatenate(pairs))
    tokens = [_tokens(sounding) for sounding in notes]
    lengths = np.array([len(row) for row in tokens])
    targets = np.array(labels)
    cut = _disjoint.stratified(targets, SHARES, groups=groups)
    return dict(
        tokens=np.concatenate(tokens),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=targets,
        groups=groups,
        **{split: cut[split] for split in SPLITS},
    )


def _names(tune: _abc.Tune, file: int) -> list[str]:
    """What variants of a tune have in common: each title; the number of Essen's index without the variant's letter."""
    titles = [_disjoint.plain(title) for title in tune.header.get("T", [])]
    numbers = [match[1] for note in tune.header.get("N", []) if (match := re.fullmatch(r"([A-Z]+\d+)[A-Z]*", note))]
    return [f"title {title}" for title in titles if len(title) > 3] + [f"{file} {number}" for number in numbers]


def _melody(notes: np.ndarray) -> str:
    """A tune in any key as text: one character for the step from the note before and the duration."""
    pitch, ticks = notes.T
    steps = np.where(pitch == _abc.REST, 0, np.diff(pitch, prepend=pitch[:1]).clip(-30, 30) + 31)
    return "".join(map(chr, 0x100 + steps * 1024 + ticks.clip(0, 1023)))


def _tokens(notes: np.ndarray) -> np.ndarray:
    """Pitch and duration by turns [2 N], uint8."""
    pitch, ticks = notes.T
    high = np.where(pitch == _abc.REST, REST, PITCH + pitch.clip(LOWEST, HIGHEST) - LOWEST)
    place = np.searchsorted(VALUES, ticks).clip(0, len(VALUES) - 1)
    value = np.where(np.array(VALUES)[place] == ticks, VALUE + place, OTHER)
    return np.stack([high, value], 1).astype(np.uint8).ravel()
