"""Every row of conf/attention keeps the contract, in every slot that it declares."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from attentions.base import UnsupportedPattern
from bench.config import CONF, ROOT
from bench.contract import CHECKS, run
from bench.contract.layers import constructor, slot

ROWS = {path.stem: path for path in sorted((CONF / "attention").glob("*.yaml"))}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("row", ROWS)
def test_contract(row, check):
    config: Any = OmegaConf.to_container(OmegaConf.load(ROWS[row]), resolve=True)
    outcomes = run(instantiate(config, _convert_="all"), row, config=config, checks=[check])
    broken = [f"{outcome.pattern}: {outcome.detail}" for outcome in outcomes if outcome.status == "fail"]
    assert not broken, "; ".join(broken)
    if all(outcome.status == "skip" for outcome in outcomes):
        pytest.skip("; ".join(sorted({outcome.detail for outcome in outcomes})) or f"not about the patterns of {row}")


@pytest.mark.parametrize("row", ROWS)
def test_every_row_says_what_it_is_what_it_costs_and_why_it_cannot(row):
    """One sentence in the YAML, a declared cost, and for each pattern that it lacks the reason."""
    comment, *_ = ROWS[row].read_text().splitlines()
    assert comment.startswith("# ") and comment.endswith(".")
    factory = instantiate(OmegaConf.load(ROWS[row]), _convert_="all")
    cls = constructor(factory)
    if cls is None:
        return  # a hybrid has what its members have
    assert cls.complexity != "not declared" and cls.paper and cls.__doc__
    for pattern in ~cls.patterns:
        with pytest.raises(UnsupportedPattern, match=r"is not defined for .* attention \(.{15,}\); it has: "):
            factory(slot(pattern))


def command(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "bench.check", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_the_command_prints_a_line_per_check_and_pattern_and_ends_with_0():
    done = command("attention=sliding_window", "attention.window=5")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in lines[:-1]} == {"pass"}
    assert {line.split()[1] for line in lines[:-1]} == set(CHECKS)
    assert lines[-1].startswith(f"sliding_window(window=5): {len(lines) - 1} passed, 0 failed, 0 skipped in ")


def test_the_command_finds_the_fault_of_a_plugin_and_ends_with_1(tmp_path):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").touch()
    (tmp_path / "my_pkg" / "leaky.py").write_text(
        "from attentions.dense.softmax import Softmax\n\n\n"
        "class Leaky(Softmax):\n"
        "    def __init__(self, spec):\n"
        "        super().__init__(spec)\n\n"
        "    def forward(self, x, context=None, *, key_mask=None):\n"
        "        return super().forward(x, context, key_mask=key_mask) + x.mean(1, keepdim=True)\n"
    )
    (tmp_path / "conf" / "attention").mkdir(parents=True)
    (tmp_path / "conf" / "attention" / "leaky.yaml").write_text("_target_: my_pkg.leaky.Leaky\n_partial_: true\n")
    done = command("--config-dir", "conf", "plugins=[my_pkg]", "attention=leaky", cwd=tmp_path)
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("fail")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert {"no_look_ahead", "step_by_step", "key_mask"} <= set(failed)
    assert not {"yaml_keys", "patterns", "batch_rows", "precision", "same_seed", "heads"} & set(failed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention=sofmax"], 'unknown attention "sofmax"; nearest: softmax'),
        (["attention=sliding_window", "attention.widnow=5"], "nearest: attention.window"),
        (["attention=softmax", "--config-dir", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_ends_with_2(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
