"""Where data lie on this machine, and arrays that are made once and mapped into memory by every later process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
    with contextlib.suppress(OSError, ValueError):
        if folder.is_dir():
            return {path.stem: np.load(path, mmap_mode="c") for path in sorted(folder.glob("*.npy"))}
    made = {name: np.ascontiguousarray(array) for name, array in make().items()}
    temporary = folder.with_name(f".new-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        for name, array in made.items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "key.json").write_text(json.dumps(dict(key), indent=1, default=str), encoding="utf-8")
        temporary.rename(folder)
    except OSError:  # full, not writable, or somebody was faster
        shutil.rmtree(temporary, ignore_errors=True)
    return made


def numbers(key: Mapping[str, Any], make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """A few named numbers, kept as `arrays` keeps arrays."""
    stored = arrays(key, lambda: {name: np.array(value, dtype=np.float64) for name, value in make().items()})
    return {name: float(value) for name, value in stored.items()}
