"""Random numbers inside compiled loops: one stream per example, so example k never depends on how many were drawn.

SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195): a counter with a mixing function,
equal bits on every machine and under every version of numpy. A state is an array of one uint64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit

from tasks import _cache

STEP, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S11, S27, S30, S31, S32 = (np.uint64(bits) for bits in (11, 27, 30, 31, 32))


def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled on its first call, and kept beside the generated data: compiling takes seconds.

    The folder bears the hash of this file, whose functions are compiled into others; numba itself sees to edits of the
    file that `function` stands in. Where the folder cannot be written, every process compiles for itself.
    """
    folder = _cache.root() / "compiled" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    before = vars(config)["CACHE_DIR"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        vars(config)["CACHE_DIR"] = str(folder)
        return njit(cache=True)(function)
    except (OSError, RuntimeError):
        return njit(function)
    finally:
        vars(config)["CACHE_DIR"] = before


def key(text: str) -> np.uint64:
    """The key of all streams of one purpose, such as "listops test seed=0"."""
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


@compiled
def mixed(z):
    z = (z ^ (z >> S30)) * FIRST
    z = (z ^ (z >> S27)) * SECOND
    return z ^ (z >> S31)


@compiled
def start(state, key, index):
    """Set `state` to the beginning of stream `index`."""
    state[0] = mixed(key ^ mixed(np.uint64(index) * STEP + STEP))


@compiled
def bits(state):
    """The next 64 bits."""
    state[0] += STEP
    return mixed(state[0])


@compiled
def below(state, n):
    """Uniform among 0 .. n - 1, n < 2**31; off by less than n / 2**32."""
    return np.int64(((bits(state) >> S32) * np.uint64(n)) >> S32)


@compiled
def uniform(state):
    """Uniform in [0, 1)."""
    return np.float64(bits(state) >> S11) * 2.0**-53
