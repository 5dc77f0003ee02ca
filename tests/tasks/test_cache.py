"""Arrays made once: equal keys, processes at the same time, damage, and folders that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tasks import _cache

ROOT = Path(__file__).parents[2]
KEY = {"task": "t", "version": 1, "split": "train", "seed": 3}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_cache.ROOT, str(tmp_path / "data"))
    return tmp_path / "data"


def maker(log):
    def make():
        log.append("made")
        return {
            "tokens": np.arange(6, dtype=np.int16).reshape(2, 3).T,
            "labels": np.array(7.5),
            "none": np.zeros((0, 3)),
        }

    return make


def test_arrays_are_made_once_and_come_back_with_their_types_and_shapes():
    log = []
    first, second = (_cache.arrays(KEY, maker(log)) for _ in range(2))
    assert log == ["made"]
    for got in (first, second):
        assert list(got) == ["tokens", "labels", "none"]
        assert got["tokens"].dtype == np.int16 and got["tokens"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert got["labels"].shape == () and float(got["labels"]) == 7.5
        assert got["none"].shape == (0, 3)


def test_every_part_of_the_key_counts_and_its_order_does_not():
    log = []
    _cache.arrays(KEY, maker(log))
    _cache.arrays(dict(reversed(KEY.items())), maker(log))
    assert len(log) == 1
    for name in KEY:
        _cache.arrays({**KEY, name: "other"}, maker(log))
    assert len(log) == 1 + len(KEY)


def test_what_one_reader_writes_stays_its_own():
    _cache.arrays(KEY, maker([]))
    one, other = (_cache.arrays(KEY, maker([])) for _ in range(2))
    one["tokens"][0, 0] = 99
    assert other["tokens"][0, 0] == 0 and _cache.arrays(KEY, maker([]))["tokens"][0, 0] == 0
    assert isinstance(one["tokens"], np.memmap)


@pytest.mark.parametrize("damage", ["cut short", "emptied", "array gone", "description gone"])
def test_damaged_arrays_are_made_again_and_stored(folder, damage):
    log = []
    _cache.arrays(KEY, maker(log))
    (stored,) = (folder / "generated").iterdir()
    array = stored / "tokens.npy"
    if damage == "cut short":
        array.write_bytes(array.read_bytes()[:-4])
    elif damage == "emptied":
        array.write_bytes(b"")
    else:
        (array if damage == "array gone" else stored / "key.json").unlink()
    assert _cache.arrays(KEY, maker(log))["tokens"].sum() == 15
    assert _cache.arrays(KEY, maker(log))["tokens"].sum() == 15
    assert log == ["made"] * 2


def test_a_maker_that_fails_leaves_nothing(folder):
    def fail():
        raise RuntimeError("no such data")

    with pytest.raises(RuntimeError, match="no such data"):
        _cache.arrays(KEY, fail)
    assert not folder.exists() or not list(folder.rglob("*"))


def test_an_interrupted_write_leaves_nothing_and_a_killed_ones_leavings_go_after_a_day(folder, monkeypatch):
    made = folder / "generated"
    for name, age in ((".new-old", 90_000), (".new-young", 60)):
        (made / name).mkdir(parents=True)
        os.utime(made / name, (time.time() - age,) * 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _cache.arrays(KEY, lambda: {"a": np.zeros(3)})
    assert [path.name for path in made.iterdir()] == [".new-young"]


def test_a_folder_that_cannot_be_written_costs_only_the_making(folder):
    folder.write_text("a file in the way")
    log = []
    for _ in range(2):
        assert _cache.arrays(KEY, maker(log))["tokens"].sum() == 15
    assert log == ["made"] * 2 and folder.read_text() == "a file in the way"


def test_makers_at_the_same_time_store_one_whole_copy(folder):
    """Each waits for the other before it is done, so both make; each sees whole arrays, and one copy is kept."""
    code = """
import sys, time
from pathlib import Path
import numpy as np
from tasks import _cache
here, there = (Path(name) for name in sys.argv[1:])
def make():
    here.touch()
    while not there.exists():
        time.sleep(0.005)
    return {"a": np.arange(1000), "b": np.arange(1000)}
got = _cache.arrays({"task": "t"}, make)
print(int(got["a"].sum() + got["b"].sum()))
"""
    names = [str(folder.parent / name) for name in ("one", "two")]
    both = [
        subprocess.Popen([sys.executable, "-c", code, *order], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for order in (names, names[::-1])
    ]
    assert [process.communicate(timeout=60)[0] for process in both] == ["999000\n"] * 2
    (stored,) = (folder / "generated").iterdir()
    assert sorted(path.name for path in stored.iterdir()) == ["a.npy", "b.npy", "key.json"]
    assert json.loads((stored / "key.json").read_text())["key"] == {"task": "t"}


def test_numbers_are_floats_that_come_back():
    log = []

    def make():
        log.append("made")
        return {"majority": 0.125, "linear": np.float32(0.5)}

    got = [_cache.numbers(KEY, make) for _ in range(2)]
    assert got == [{"majority": 0.125, "linear": 0.5}] * 2 and len(log) == 1
    assert all(type(value) is float for value in got[1].values())
