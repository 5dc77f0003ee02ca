"""Each pattern's task measures what its attention does: softmax solves it, and without attention it stays at chance."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate

from bench.backbones.base import build
from bench.cell import make_task
from bench.config import CONF, compose, options
from bench.evaluation import evaluate
from bench.expand import expand
from bench.training import train
from tests.bench import sweeping

PATTERNS = sorted(options("pattern"))
SEGMENTS = "[{{length: 16, num_pairs: 3, num_examples: {n}}}, {{length: 20, num_pairs: 4, num_examples: {n}}}]"
SIZES = [
    "task.vocab_size=24",
    *(f"task.{split}={SEGMENTS.format(n=n)}" for split, n in (("train", 4000), ("valid", 100), ("test", 200))),
]


def accuracy(pattern, attention, steps):
    """On test after training at most `steps` steps of the small budget at its middle learning rate."""
    budget = ["budget=small", f"budget.max_steps={steps}", "budget.warmup_steps=10", "budget.eval_every=20"]
    choice = compose([f"pattern={pattern}", f"attention={attention}", *budget, *SIZES])
    task = make_task(choice.parts["task"])
    splits = {split: task.segments(split, 0) for split in ("train", "valid", "test")}
    backbone, mechanism = (instantiate(choice.parts[part], _convert_="all") for part in ("backbone", "attention"))
    model = build(backbone, task.spec, mechanism, seed=0)
    assert train(model, task, splits, choice.budget, 0.01, 0, torch.device("cpu")).status == "ok"
    return evaluate(model, task, splits["test"], choice.budget).value("accuracy")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_softmax_solves_the_pattern(pattern):
    assert accuracy(pattern, "softmax", 300) > 0.97


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_attention_the_pattern_stays_at_chance(pattern):
    chance, questions = 2 / 24, 200 * (3 + 4)
    assert abs(accuracy(pattern, "none", 100) - chance) < 4 * (chance * (1 - chance) / questions) ** 0.5


def test_the_suite_plans_every_mechanism_in_every_pattern():
    planned = {(job.names["task"], job.names["backbone"], job.names["attention"]) for job in expand(["suite=patterns"])}
    rows = {path.stem for path in (CONF / "attention").glob("*.yaml") if "hybrid" not in path.stem}
    assert {attention for _, _, attention in planned} == rows
    assert len(planned) == len(PATTERNS) * len(rows)
    assert ("recall_causal_cross", "encoder_decoder", "softmax") in planned


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A tiny sweep over the four patterns: what it printed, and its records by task and mechanism."""
    folder = tmp_path_factory.mktemp("patterns")
    tiny = [text for text in sweeping.TINY if not text.startswith("backbone")]
    overrides = [f"pattern={','.join(PATTERNS)}", "attention=softmax,nystrom,sliding_window", "backbone.dim=8", *tiny]
    done = sweeping.command("-m", "bench", "-m", *overrides, f"results={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = sweeping.records(folder).values()
    return done.stdout, {(record["task"]["id"], record["names"]["attention"]): record for record in found}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_run_records_its_pattern_group_and_why_a_mechanism_cannot(pattern, swept):
    printed, records = swept
    words = pattern.replace("_", " ")
    rows = {name: record for (task, name), record in records.items() if task == f"recall/{pattern}"}
    assert {record["pattern"] for record in rows.values()} == {words}
    assert {record["task"]["group"] for record in rows.values()} == {"patterns"}
    assert rows["softmax"]["status"] == "ok"
    refused = {"nystrom": not pattern.startswith("noncausal"), "sliding_window": pattern.endswith("cross")}
    for name, expected in refused.items():
        assert (rows[name]["status"] == "unsupported") == expected
        if expected:  # the mathematical reason stands in the record and in the table
            assert f"is not defined for {words} attention (" in rows[name]["reason"]
            assert "unsupported" in printed
    if pattern.startswith("causal"):
        assert rows["softmax"]["efficiency"]["state_bytes"] > 0
    else:
        assert "does not decode" in rows["softmax"]["efficiency"]["no_decoding"]


def test_a_sweep_over_the_patterns_ends_with_the_composite_index(swept):
    assert "composite index" in swept[0] and "patterns" in swept[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pattern=causal_corss"], 'unknown pattern "causal_corss"; nearest: causal_cross'),
        (
            ["task=recall_causal_cross", "backbone=conv_decoder"],
            "the task has a context; type backbone=cross or backbone=encoder_decoder",
        ),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path):
    done = sweeping.command("-m", "bench", *words, "budget=smoke", f"results={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
