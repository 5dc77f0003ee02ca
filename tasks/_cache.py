"""Where data lie on this machine, and arrays that are made once and mapped into memory by every later process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTION = "key.json"  # beside the arrays: their names, and what they depend on
ROOT = "ATTENTION_BENCHMARK_DATA"  # environment variable: another folder than the one in the user's cache


def root() -> Path:
    """The folder of fetched and generated data."""
    chosen = os.environ.get(ROOT)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "attention-benchmark"


def digest(key: Mapping[str, Any]) -> str:
    """Twenty hex digits of everything that data depend on."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def arrays(key: Mapping[str, Any], make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `make` gives for `key`, made on first use and mapped from disk afterwards.

    Args:
        key: everything that the arrays depend on: task, version, settings, split, seed. Equal keys mean equal arrays.
        make: called when nothing is stored under the key; names are file names.

    Returns:
        Arrays mapped copy-on-write: what a process writes into one stays its own.

    A folder that cannot be written costs the time of making the arrays again, and nothing else.
    """
    folder = root() / "generated" / digest(key)
    if (stored := _read(folder)) is not None:
        return stored
    made = {name: np.asarray(array, order="C") for name, array in make().items()}
    try:
        temporary = new_folder(folder.parent)
    except OSError:  # not writable
        return made
    try:
        for name, array in made.items():
            np.save(temporary / f"{name}.npy", array)
        description = json.dumps({"names": list(made), "key": dict(key)}, indent=1, default=str)
        (temporary / DESCRIPTION).write_text(description, encoding="utf-8")
        if folder.is_dir() and _read(folder) is None:  # damaged, else somebody was faster
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError:  # full, or somebody was faster
        return made
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _read(folder) or made


def new_folder(parent: Path) -> Path:
    """An empty folder to write in before it gets its name; what a killed process left a day ago or earlier is removed.

    Raises:
        OSError: it cannot be made.
    """
    temporary = parent / f".new-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    for left in parent.glob(".new-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left)
    return temporary


def _read(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays in a folder; None when there is none or anything is missing or damaged."""
    try:
        names = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["names"]
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
    except (OSError, ValueError, EOFError, KeyError):
        return None


def numbers(key: Mapping[str, Any], make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """A few named numbers, kept as `arrays` keeps arrays."""
    stored = arrays(key, lambda: {name: np.array(value, dtype=np.float64) for name, value in make().items()})
    return {name: float(value) for name, value in stored.items()}
