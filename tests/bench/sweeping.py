"""Tiny sweeps for tests: in this process, and as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench import plan
from bench.config import compose
from bench.store import Store

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty_plugin" / "conf"
SEGMENT = "{length: 12, num_pairs: 2, num_examples: %d}"
TINY = [
    "backbone=decoder",
    "backbone.dim=6",
    "backbone.num_heads=1",
    "backbone.num_layers=1",
    "budget=smoke",
    "budget.max_steps=4",
    "budget.eval_every=2",
    "budget.batch_size=7",
    "device=cpu",
    "jobs=1",
    "task.vocab_size=32",
    f"task.train=[{SEGMENT % 23}]",
    f"task.valid=[{SEGMENT % 5}]",
    f"task.test=[{SEGMENT % 11}]",
]
TIMES = ("wall_seconds", "started_at", "environment", "checksum", "attempt", "files")
MEASURED = ("seconds", "tokens_per_second", "decode_ms_per_token", "peak_memory_bytes")


def cell(*overrides: str) -> plan.Cell:
    """The planned cell of a tiny configuration; the broken mechanisms are among the names."""
    return plan.cell(compose([*TINY, "plugins=[faulty_plugin]", *overrides], str(FAULTY)))


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(FAULTY.parents[1])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **extra}


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A Python command as a user types it, such as `-m bench.list`."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )


def start(results: Path, *overrides: str, folder: Path | None = None, limit=None) -> subprocess.Popen:
    """`python -m bench` on a tiny configuration, started; `folder` is that of the faults, `limit` runs in the child."""
    flags = [f"--config-dir={FAULTY}", *(text for text in overrides if text.startswith("-"))]
    settings = [*TINY, "plugins=[faulty_plugin]", f"results={results}"]
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *flags, *settings, *(text for text in overrides if not text.startswith("-"))],
        cwd=results.parent,
        env=environment(**({"FAULTY": str(folder)} if folder else {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def sweep(results: Path, *overrides: str, **how) -> subprocess.CompletedProcess:
    """`start`, waited for."""
    process = start(results, *overrides, **how)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def records(results: Path) -> dict[str, dict]:
    """Run id -> newest record; every one must be readable."""
    found, warnings = Store(results).read_all()
    assert warnings == []
    return {record["run_id"]: record for record in found}


def table(results: Path) -> dict[str, dict]:
    """What a leaderboard is made of: all that records say, without times and places."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in MEASURED}
        return value

    return {
        run_id: strip({key: value for key, value in record.items() if key not in TIMES})
        for run_id, record in records(results).items()
    }
