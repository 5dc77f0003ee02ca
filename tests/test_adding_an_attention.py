"""docs/adding_an_attention.md, done to the letter in a temporary folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import TINY

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/adding_an_attention.md").read_text()


@pytest.fixture
def newcomer(tmp_path):
    """The page's two files in a folder of the user's, and a way to run its commands there."""
    names = re.findall(r"`(my_\w+/[\w/]+\.(?:py|yaml))`", PAGE)
    bodies = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)
    assert len(names) == len(bodies) == 2
    for name, body in zip(names, bodies, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)

    def run(command: str, *extra: str) -> subprocess.CompletedProcess:
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*words, *extra], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)

    return run


def commands() -> list[str]:
    return [line for line in PAGE.split("run it** beside ours:")[1].splitlines() if line.startswith("python ")]


def test_one_file_and_one_yaml_pass_the_contract_and_join_the_table(newcomer):
    check, train = commands()
    checked = newcomer(check)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    trained = newcomer(train.replace("seed=0,1,2", "seed=0,1"), "budget=smoke", "device=cpu", *TINY[:-1])
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "recent_mean" in trained.stdout and "softmax" in trained.stdout


def test_without_plugins_the_users_package_is_refused_in_one_line(newcomer):
    refused = newcomer(commands()[1].replace("plugins=[my_pkg]", ""))
    assert refused.returncode == 2
    assert refused.stderr.strip().count("\n") == 0
    assert "plugins=[my_pkg]" in refused.stderr
