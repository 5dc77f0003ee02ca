"""docs/adding_a_task.md, done to the letter in a temporary folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/adding_a_task.md").read_text()
BUDGET = ["budget.max_steps=60", "budget.batch_size=64", "budget.learning_rates=[0.003]", "device=cpu"]


def test_one_file_and_one_yaml_give_a_leaderboard_with_its_floor(tmp_path):
    names = re.findall(r"`(my_\w+/[\w/]+\.(?:py|yaml))`", PAGE)
    bodies = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)
    assert len(names) == len(bodies) == 2
    for name, body in zip(names, bodies, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)
    (command,) = re.findall(r"```sh\n(.*)\n```", PAGE)
    words = [sys.executable if word == "python" else word for word in shlex.split(command.replace("0,1,2", "0"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, *BUDGET, "jobs=1"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (board,) = (tmp_path / "results" / "leaderboards").glob("*/leaderboard.md")
    text = board.read_text()
    assert "softmax" in text and "first token" in text


def test_its_splits_are_disjoint_and_its_labels_right():
    body = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    scope: dict = {"__name__": "majority"}
    exec(body, scope)
    task = scope["Majority"](length=9, train=200, valid=50, test=60)
    splits = {split: task.segments(split, 0)[0] for split in ("train", "valid", "test")}
    assert [len(part) for part in splits.values()] == [200, 50, 60]
    rows = [tuple(row) for part in splits.values() for row in part.inputs.tolist()]
    assert len(set(rows)) == 310
    targets = [int(target) for part in splits.values() for target in part.targets]
    assert targets == [int(sum(row) > 4) for row in rows]
