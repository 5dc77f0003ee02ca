"""Sensor series: the .ts format, the published cut, scaling, patches and floors."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tasks import _ts
from tasks.sensors import SETS, Sensors
from tasks.sources import MissingData
from tests.tasks.packaged import fetched

SPLITS = "train", "valid", "test"
HEADER = "#comment\n@problemName X\n@timeStamps false\n@classLabel true {}\n@data\n"


@pytest.fixture(scope="module")
def archive():
    return fetched("sensors")


def vowels(folder, train=36, test=18):
    """JapaneseVowels' format: 12 channels, series of unequal length, a channel of its own for each speaker."""
    rng = np.random.default_rng(0)
    for part, number in (("TRAIN", train), ("TEST", test)):
        lines = []
        for i in range(number):
            series = rng.normal(size=(12, rng.integers(7, 30))).round(6)
            series[i % 9] += 9
            lines.append(":".join(",".join(map(str, channel)) for channel in series) + f":{i % 9 + 1}")
        text = HEADER.format(" ".join(map(str, range(1, 10)))) + "\n".join(lines) + "\n"
        (folder / f"JapaneseVowels_{part}.ts").write_text(text)
    return str(folder)


def test_series_are_read_with_their_channels_and_labels():
    series, labels = _ts.read(HEADER.format("a b") + "1,2,3:4,5,6:a\n\n# no case\n-1e3,0:7,8:b\n", "X.ts")
    assert labels == ["a", "b"]
    assert series[0].tolist() == [[1, 4], [2, 5], [3, 6]] and series[1].tolist() == [[-1000, 7], [0, 8]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2:a\n", "X.ts has no line @data"),
        ("@classLabel false\n@data\n1,2\n", "no line @classLabel true"),
        ("@timeStamps true\n@classLabel true a\n@data\n(1,2):a\n", "time stamps, which are not read"),
        (HEADER.format("a") + "1,?,3:a\n", "line 6: must be numbers between commas"),
        (HEADER.format("a") + "1,NaN:a\n", "line 6: must be numbers"),
        (HEADER.format("a") + "1,2:3:a\n", "channels of one length"),
        (HEADER.format("a") + "1,2:3,4:a\n1,2:a\n", "line 7: 1 channels after 2"),
    ],
)
def test_another_format_is_one_line(text, message):
    with pytest.raises(MissingData, match=message):
        _ts.read(text, "X.ts")


def test_valid_is_carved_from_train_and_channels_are_scaled_by_train_alone(tmp_path):
    task = Sensors(data="japanese_vowels", path=vowels(tmp_path))
    train, valid, test = (task.segments(split, 0)[0] for split in SPLITS)
    assert [len(part) for part in (train, valid, test)] == [27, 9, 18]
    assert sorted(valid.targets[:, 0].tolist()) == list(range(9))
    values = train.inputs[train.key_mask]
    assert torch.allclose(values.mean(0), torch.zeros(12), atol=1e-5)
    assert torch.allclose(values.std(0, correction=0), torch.ones(12), atol=1e-5)
    published, _ = _ts.read((tmp_path / "JapaneseVowels_TEST.ts").read_text(), "")
    assert test.slices["length"].tolist() == [len(series) for series in published]
    assert (test.inputs[~test.key_mask] == 0).all()
    scale = [(test.inputs[3, t] - test.inputs[3, 0]).numpy() / (published[3][t] - published[3][0]) for t in (1, 2)]
    assert (scale[0] > 0).all() and scale[0] == pytest.approx(scale[1], rel=1e-3)


def test_patches_hold_the_same_moments_in_fewer_positions(tmp_path):
    path = vowels(tmp_path)
    one, four = (Sensors(data="japanese_vowels", patch=patch, path=path) for patch in (1, 4))
    assert four.spec.length == 8 and four.spec.inputs.dim == 48 and four.protocol == "japanese_vowels-patch4"
    a, b = one.segments("test", 0)[0], four.segments("test", 0)[0]
    assert torch.equal(b.inputs.reshape(18, 32, 12)[:, :29], a.inputs)
    assert torch.equal(b.slices["length"], (a.slices["length"] + 3) // 4)


def test_what_train_shares_with_test_and_repeats_is_removed_from_train(tmp_path):
    path = vowels(tmp_path)
    file = tmp_path / "JapaneseVowels_TRAIN.ts"
    test_line = (tmp_path / "JapaneseVowels_TEST.ts").read_text().splitlines()[5]
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, test_line, lines[7], lines[7]]) + "\n")
    task = Sensors(data="japanese_vowels", path=path)
    assert sum(len(task.segments(split, 0)[0]) for split in ("train", "valid")) == 36
    assert len(task.segments("test", 0)[0]) == 18


def test_floors_of_speakers_that_differ_by_their_channel_are_right(tmp_path):
    task = Sensors(data="japanese_vowels", path=vowels(tmp_path))
    floors = task.solvers({split: task.segments(split, 0) for split in SPLITS})
    assert floors["majority"] == pytest.approx(1 / 9) and floors["linear, statistics"] == 1.0
    assert 0 <= floors["nearest series"] <= 1


def test_bad_values_are_one_line(tmp_path):
    with pytest.raises(ValueError, match='unknown data "basic_motion"; nearest: basic_motions'):
        Sensors(data="basic_motion")
    with pytest.raises(ValueError, match="patch must be from 1 to 29, the longest series, got 30"):
        Sensors(data="japanese_vowels", patch=30)
    path = vowels(tmp_path)
    file = tmp_path / "JapaneseVowels_TEST.ts"
    file.write_text(file.read_text().replace(":9\n", ":10\n", 1))
    with pytest.raises(MissingData, match=r"JapaneseVowels_TEST\.ts has the label 10; there are: 1, 2"):
        Sensors(data="japanese_vowels", path=path).segments("test", 0)


@pytest.mark.parametrize(
    ("data", "sizes", "pinned"),
    [
        ("basic_motions", [32, 8, 40], "854c7361ee2d9da7"),
        ("japanese_vowels", [207, 63, 370], "9d86c730f2a670ef"),
        ("acsf1", [80, 20, 100], "5a9afc7be80a0122"),
        ("arrow_head", [27, 9, 175], "f374d5f9c64cce9d"),
    ],
)
def test_the_packaged_series_are_pinned(archive, data, sizes, pinned):
    task = Sensors(data=data)
    parts = [task.segments(split, 0)[0] for split in SPLITS]
    assert [len(part) for part in parts] == sizes
    assert all(part.inputs.shape[1:] == (SETS[data].longest, SETS[data].channels) for part in parts)
    labels = hashlib.sha256("".join(part.sha256()["labels"] for part in parts).encode()).hexdigest()
    assert labels[:16] == pinned, "other series or another cut: bump Sensors.version"
