"""Which suite and which backbone a task implies."""

from __future__ import annotations

import pytest

from bench.config import compose, options
from bench.errors import UserError
from bench.expand import expand
from bench.suites import _brought, _read, backbone_of, completed, named, suite_of


def test_a_task_belongs_to_the_suite_that_names_it_or_one_of_its_class():
    assert suite_of("mqar") == "recall"  # several name it: the first of all goes before the others
    assert suite_of("digits") == "images"
    assert suite_of("mqar_large") == "recall"  # named by none, of mqar's class
    assert suite_of("recall_causal_cross") == "recall"  # nowhere at all


def test_a_published_row_brings_its_published_network_and_no_other_does():
    for task, suite in (("byte_text_lra", "byte_text_paper"), ("etth1_paper", "informer_paper"), ("pathx_lra",) * 2):
        assert suite_of(task) == suite.replace("_lra", "_paper")
    assert [suite_of(task) for task in ("byte_text", "etth1", "pathx", "grey_cifar10")] == [
        *("documents", "forecasting", "pathfinder", "pixels"),
    ]
    assert compose(["task=byte_retrieval_lra"]).names["backbone"] == "dual_encoder_paper"


@pytest.mark.parametrize("group", ["backbone", "budget"])
def test_every_published_part_belongs_to_a_published_suite(group):
    paper = [path for name, path in options("suite").items() if name.endswith("_paper")]
    named = {name for path in paper for name in _brought(_read(path), group)}
    assert {name for name in options(group) if name.endswith("_paper")} <= named


def test_auto_becomes_the_suite_and_leaves_the_rest():
    assert completed(["suite=auto", "task=digits", "seed=0"]) == ["suite=images", "task=digits", "seed=0"]
    assert completed(["suite=auto"]) == ["suite=recall"]


def test_a_task_alone_brings_the_backbone_of_its_suite():
    assert completed(["task=digits"]) == ["task=digits", f"backbone={backbone_of('digits')}"]
    assert completed(["task=mqar"]) == ["task=mqar"]
    for chosen in ("backbone=encoder", "suite=images", "pattern=causal_self"):
        assert completed(["task=digits", chosen]) == ["task=digits", chosen]


def test_a_task_made_for_a_pattern_brings_the_backbone_of_the_pattern():
    assert completed(["task=recall_noncausal_cross"]) == ["task=recall_noncausal_cross", "backbone=cross"]
    assert completed(["suite=auto", "task=recall_noncausal_cross"])[-1] == "backbone=cross"
    assert completed(["suite=auto", "task=recall_noncausal_cross", "pattern=noncausal_cross"])[-1].startswith("pattern")


def test_every_task_has_a_suite_or_a_pattern():
    for task in options("task"):
        assert named(task) or task.startswith("recall_"), f"{task}: name it, or one of its class, in a suite"


def test_tasks_of_different_suites_ask_for_a_backbone():
    with pytest.raises(UserError, match=r"no backbone in common .*type backbone=NAME"):
        completed(["task=digits,mqar"])


def test_status_and_single_runs_see_the_same_backbone():
    assert compose(["task=digits"]).names["backbone"] == "image_encoder"
    assert {choice.names["backbone"] for choice in expand(["task=digits", "attention=softmax,none"])} == {
        "image_encoder"
    }


def test_an_unknown_task_is_left_to_the_usual_error():
    assert completed(["task=diggits"]) == ["task=diggits"]
    with pytest.raises(UserError, match="nearest: digits"):
        compose(["task=diggits"])
