"""Every command of the README runs, and what it shows was made by them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.config import options
from bench.list import attentions
from tasks import sources

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TINY = [
    "budget.max_steps=2",
    "budget.batch_size=4",
    "budget.learning_rates=[0.01]",
    "task.train=[{length: 16, num_pairs: 2, num_examples: 16}]",
    "task.valid=[{length: 16, num_pairs: 2, num_examples: 4}]",
    "task.test=[{length: 16, num_pairs: 2, num_examples: 4}]",
    "seed=0",
]
OTHER_TASKS = {  # choice -> mechanisms, and sizes of the task
    "SUITE=images": ("softmax,neighborhood", []),
    "SUITE=lm": ("softmax,none", ["task.limits={train: 100000, valid: 2000, test: 8000}"]),
    "TASK=listops": ("softmax,none", ["task.train=64", "task.valid=16", "task.test=16"]),
}
DATA = {"SUITE=lm": "kjv", "kjv": "kjv"}  # a word of a command -> the source that it needs


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(words: list[str], results: Path) -> subprocess.CompletedProcess:
    """The command as typed, made small and pointed at a folder of its own."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    words = [word.replace("glob(*)", "glob(s*)") for word in words]  # the whole catalogue takes minutes
    if "SUITE=patterns" in words or "SUITE=catalogue" in words:
        words = [*words, "ATTENTION=softmax,nystrom"]
    tiny = TINY
    for choice, (attention, sizes) in OTHER_TASKS.items():
        if choice in words:
            words = [*words, f"ATTENTION={attention}"]
            tiny = [*(word for word in TINY if not word.startswith("task.")), *sizes]
    if words[:2] == ["make", "bench"]:
        words = [*words, f"RESULTS={results}", "DEVICE=cpu", f"ARGS={shlex.join(tiny)}", f"PY={sys.executable}"]
        words = [word for word in words if not word.startswith("SEEDS=")]
    elif words[:3] == ["python", "-m", "bench"] and "--cfg" not in words:
        words = [w for w in words if not w.startswith("seed=")] + [*TINY, f"results={results}", "device=cpu"]
    elif words[:3] == ["python", "-m", "bench.report"]:
        words = [*words, "--results", str(results)]
    return subprocess.run(
        words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL
    )


def test_the_two_commands_come_first():
    assert commands()[:2] == ["make bench TASK=mqar", "make test"]


@pytest.mark.parametrize("command", [c for c in commands() if c != "make test"])
def test_command_of_the_readme_runs(command, tmp_path):
    for name in {DATA[word] for word in command.split() if word in DATA}:
        try:
            sources.fetch(name)
        except sources.MissingData as error:
            pytest.skip(f"no {name} here, and it cannot be had: {error}")
    (tmp_path / "results").mkdir()
    done = run(shlex.split(command), tmp_path / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
    if "bench" in command.split() and "--cfg" not in command:
        boards = list((tmp_path / "results" / "leaderboards").glob("*/leaderboard.md"))
        assert boards, "the main job writes a leaderboard"


def test_make_test_runs_pytest():
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "-m pytest" in done.stdout


def test_table_and_picture_are_those_of_the_committed_leaderboard():
    path = "results/leaderboards/mqar/leaderboard.md"  # a user's own run replaces it; what is committed is what we show
    show = ["git", "-C", str(ROOT), "show", f"HEAD:{path}"]
    committed = subprocess.run(show, capture_output=True, text=True, timeout=60).stdout
    shown = README.split("<!-- leaderboard -->")[1].split("<!-- /leaderboard -->")[0].strip().splitlines()
    assert len(shown) > 10
    boards = [[cells(line) for line in board.splitlines()] for board in (committed, (ROOT / path).read_text())]
    assert any(in_order([cells(line) for line in shown], board) for board in boards)


def cells(line: str) -> list[str]:
    """What a line of a table says, whatever the width of its columns."""
    return [cell.strip().strip("-") for cell in line.split("|")]


def in_order(lines: list[list[str]], board: list[list[str]]) -> bool:
    """Whether the lines are some of the board's, in its order."""
    rest = iter(board)
    return all(line in rest for line in lines)


def test_the_table_of_mechanisms_is_the_catalogue():
    shown = README.split("<!-- families -->")[1].split("<!-- /families -->")[0].strip().splitlines()[2:]
    families: dict[str, list[str]] = {}
    for row in attentions(options("attention"), []):
        families.setdefault(row["family"], []).append(row["attention"])
    assert shown == [f"| {family} | {', '.join(names)} |" for family, names in sorted(families.items())]


def test_links_of_all_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
