"""The page of mechanisms: what it says, and that the committed one is what the command makes."""

from __future__ import annotations

import subprocess

import pytest

from bench import mechanisms
from bench.config import ROOT, options
from bench.mechanisms import NOT_MEASURED, found, oracle_tests, page


def test_the_committed_page_is_the_one_that_the_command_makes(tmp_path):
    boards = []
    for path in (mechanisms.MQAR, mechanisms.RECALL):  # of the commit: a user's own runs replace those in the tree
        show = ["git", "-C", str(ROOT), "show", f"HEAD:{path.relative_to(ROOT)}"]
        boards.append(tmp_path / path.parent.name)
        boards[-1].write_text(subprocess.run(show, capture_output=True, text=True, timeout=60, check=True).stdout)
    made = [page(options("attention"), *boards), page(options("attention"))]
    assert mechanisms.PAGE.read_text() in made, "type python -m bench.mechanisms > docs/mechanisms.md"


def test_every_row_is_on_the_page_once_and_has_a_test():
    text = page(options("attention"))
    for name in options("attention"):
        (line,) = [line for line in text.splitlines() if line.startswith((f"| **{name}** |", f"| **{name}** ⚠ |"))]
        assert f"conf/attention/{name}.yaml" in line and "/test_" in line, f"{name} has no test of its own"


def test_a_row_says_what_the_boards_say_and_no_more():
    row = {"test_mean": "0.98765", "test_low": "0.9701", "test_high": "1.0", "rank_best": "2", "rank_worst": "4"}
    mqar, recall = {"based": row}, {"based": {"score_causal_self": "0.5", "score_noncausal_cross": ""}}
    assert found("based", mqar, recall) == ("0.988 [0.970, 1.000], rank 2–4", "CS 0.500")
    row.update(rank_best="", rank_worst="")  # it looks ahead
    assert found("based", mqar, {})[0] == "0.988 [0.970, 1.000]"
    row.update(test_mean="", status="error", reason="no such thing")
    assert found("based", mqar, {})[0] == "error (no such thing)"
    assert found("linear", mqar, recall) == (NOT_MEASURED, NOT_MEASURED)


@pytest.mark.parametrize(("home", "expected"), [("dense/softmax", ["test_softmax"]), ("hybrid", ["test_hybrid"])])
def test_the_oracle_tests_a_mechanism_are_those_of_its_file(home, expected):
    assert [path.stem for path in oracle_tests(ROOT / "attentions" / f"{home}.py")] == expected
