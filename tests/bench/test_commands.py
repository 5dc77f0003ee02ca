"""What the commands around a sweep say: names of rows, settings, status, cells that cannot be run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.config import compose
from bench.expand import expand
from tests.bench import sweeping
from tests.bench.sweeping import TINY, cell, records, sweep


def command(*words: str, cwd: Path = sweeping.ROOT) -> subprocess.CompletedProcess:
    return sweeping.command("-m", *words, cwd=cwd)


@pytest.mark.fault
def test_a_cell_with_impossible_settings_is_named_and_the_others_run(tmp_path):
    done = sweep(tmp_path / "results", "-m", "attention=softmax,none", "task.vocab_size=31,32")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "vocab_size must be even" in done.stderr
    assert sorted(r["names"]["attention"] for r in records(tmp_path / "results").values()) == ["none", "softmax"]
    assert "softmax" in done.stdout  # the table of what could be run


def test_settings_without_data_are_one_line_and_no_failed_run(tmp_path, monkeypatch):
    from bench import cell as module
    from bench.store import Store

    def load(*_):
        raise ValueError("train has no pairs")

    monkeypatch.setattr(module, "load", load)
    planned = cell("attention=none")
    with pytest.raises(module.ImpossibleCell, match=r"task mqar.*: train has no pairs"):
        module.run(planned, planned.replicas, Store(tmp_path), {}, lambda *_, **__: None)
    assert records(tmp_path) == {}


def test_an_override_with_the_value_of_the_yaml_changes_no_name():
    plain = compose(["attention=sliding_window", "budget=smoke"]).names
    same = ["attention.window=16", "attention.bias=false", "budget.max_steps=20", "task.vocab_size=64"]
    assert compose(["attention=sliding_window", "budget=smoke", *same]).names == plain
    assert (
        compose(["attention=sliding_window", "attention.window=17"]).names["attention"] == "sliding_window(window=17)"
    )


def test_the_planned_names_win_over_those_of_the_record(tmp_path, monkeypatch):
    """A run recorded under one name is the row of the sweep that asks for it under another."""
    from bench.store import Store
    from bench.tables import read_frames

    sweep(tmp_path / "results", "attention=softmax")
    store = Store(tmp_path / "results")
    (run_id,) = records(tmp_path / "results")
    mine = dict(task="mqar", backbone="decoder", budget="smoke", attention="mine")
    assert list(read_frames(store)[0].runs["attention"]) == ["softmax"]
    assert list(read_frames(store, {run_id: mine})[0].runs["attention"]) == ["mine"]


@pytest.mark.parametrize("key", ["results=a,b", "jobs=1,2", "device=cpu,auto"])
def test_a_setting_of_the_sweep_cannot_be_swept_over(key, tmp_path):
    done = command("bench", "-m", *[text for text in TINY if not text.startswith(key.split("=")[0])], key, cwd=tmp_path)
    assert done.returncode == 2
    assert "is a setting of the whole sweep" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_status_counts_what_the_same_command_would_run(tmp_path):
    from bench.store import Store

    results = tmp_path / "results"
    sweep(results, "attention=softmax")
    (record,) = records(results).values()
    store = Store(results)
    store.write({**record, "status": "killed", "reason": "planted"}, {})
    told = command("bench.status", "-m", *TINY, "attention=softmax,none", f"results={results}")
    assert told.stdout.splitlines()[-1] == "planned 2: done 0, failed 1, stale 0; to do 2"


def test_expand_plans_the_runs_that_the_application_records(tmp_path):
    from bench import plan

    done = sweep(tmp_path / "results", "-m", "attention=softmax,none", "seed=0,1")
    assert done.returncode == 0, done.stderr
    planned = plan.merge(plan.cell(c) for c in expand([*TINY, "attention=softmax,none", "seed=0,1"]))
    assert {r.run_id for cell in planned for r in cell.replicas} == set(records(tmp_path / "results"))


@pytest.mark.gpu
def test_a_gpu_is_used_by_itself_and_named_in_the_record(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = sweep(tmp_path / "results", "attention=softmax", "device=auto")
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "results").values()
    assert record["status"] == "ok" and record["environment"]["device_name"] == torch.cuda.get_device_name()


def test_the_catalogue_is_measured_and_marks_what_has_more_parameters(tmp_path):
    """The columns of one layer; a plugin's row stands beside ours."""
    done = command("bench.list", "attentions")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith(" ") and line.split()}
    for name in ("softmax", "sliding_window", "nystrom", "hybrid"):
        assert name in rows
    assert " 1.00  " in rows["softmax"] and " 131,072 " in rows["softmax"] and " 1,048,576 " in rows["softmax"]
    assert " 16,384 " in rows["sliding_window"] and "T window" in rows["sliding_window"]
    assert "!" in rows["gated_delta_net"] and "!" not in rows["softmax"]
    assert "arXiv:1706.03762" in rows["softmax"]
    assert "GPU: not measured" in done.stdout
