"""`python -m bench.data`, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.base import SPLITS
from tasks.mqar import MQAR

ROOT = Path(__file__).parents[2]
SEGMENTS = {
    "train": [{"length": 12, "num_pairs": 2, "num_examples": 23}, {"length": 20, "num_pairs": 5, "num_examples": 7}],
    "valid": [{"length": 12, "num_pairs": 3, "num_examples": 5}],
    "test": [{"length": 44, "num_pairs": 11, "num_examples": 3}],
}
OVERRIDES = [
    "task=mqar",
    "task.vocab_size=64",
    *(f"task.{split}={str(segments).replace(chr(39), '')}" for split, segments in SEGMENTS.items()),
]


def data(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench.data", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_segment_is_printed_with_its_hashes_and_saved_with_its_bytes(tmp_path):
    folder = tmp_path / "new" / "folder"
    run = data(*OVERRIDES, "seed=3", f"save={folder}")
    assert run.returncode == 0 and run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[0] == "mqar/clean, version 1, seed 3"
    assert lines[-1] == f"saved in {folder}"
    task = MQAR(protocol="clean", vocab_size=64, **SEGMENTS)
    expected = [(split, i, batch) for split in SPLITS for i, batch in enumerate(task.segments(split, 3))]
    assert len(lines) == len(expected) + 3
    for line, (split, index, batch) in zip(lines[2:-1], expected, strict=True):
        examples, length = batch.inputs.shape
        pairs = batch.targets.shape[1]
        size = 2 * examples * (length + 2 * pairs)  # int16 inputs, positions and targets
        hashes = list(batch.sha256().values())
        words = line.split()
        assert words[:7] == [str(w) for w in (split, index, examples, length, pairs, pairs, size)]
        assert words[-2:] == hashes
        assert len(words) == (10 if index == 0 else 9)  # seconds stand on the first line of a split
        with np.load(folder / f"{split}_{index}.npz") as saved:
            assert set(saved.files) == {"inputs", "labels"}
            assert (saved["inputs"] == batch.inputs.numpy()).all()
            assert (saved["labels"] == batch.labels().numpy()).all()
    assert len(list(folder.iterdir())) == len(expected)  # nothing temporary is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: which task? type for example: python -m bench.data task=mqar"),
        (("task=mqar", "save="), "error: save takes one folder; type save=FOLDER"),
        (("task=mqar", "seed=[0,1]"), "error: bench.data takes one seed, got [0, 1]; type seed=0"),
        (
            ("task=mqar", "task.vocab_size=255"),
            "error: task: vocab_size must be even (half keys, half values) and at most 16777216, got 255; "
            "nearest: 254, 256",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    run = data(*arguments)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", message + "\n")


def test_a_folder_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = data(*OVERRIDES, f"save={tmp_path / 'file'}")
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: cannot save in {tmp_path / 'file'}: ") and run.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
