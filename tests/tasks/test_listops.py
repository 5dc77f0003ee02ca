"""ListOps: the compiled law against a recursive one, the floors of the published bounds, splits and scores."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import chisquare, ks_2samp

from tasks import _listops_data as data
from tasks.base import SPLITS
from tasks.listops import OPERATORS, PROTOCOLS, SYMBOLS, ListOps

PUBLISHED = dict(shortest=501, longest=1999, max_depth=10, max_args=10)
SMALL = dict(min_length=8, max_length=30, max_depth=5, max_args=4, train=300, valid=41, test=53)
N = 8000


def words(tokens):
    return [SYMBOLS[token] for token in tokens]


def evaluate(tokens):
    """Value and depth of operators of a list of symbols, by recursion."""
    apply = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(statistics.median(v)), "[SM": lambda v: sum(v) % 10}

    def node(at):
        if tokens[at].isdigit():
            return int(tokens[at]), 0, at + 1
        values, deepest, operator, at = [], 0, tokens[at], at + 1
        while tokens[at] != "X":
            value, depth, at = node(at)
            values.append(value)
            deepest = max(deepest, depth)
        return apply[operator](values), deepest + 1, at + 1

    value, depth, end = node(0)
    assert end == len(tokens), "one tree, and nothing behind it"
    return value, depth


def naive(rng, depth=1, max_depth=10, max_args=10):
    """The published sampler in its own order: children first, then the operator."""
    if depth == max_depth or rng.random() >= 0.25:
        return [str(rng.integers(10))]
    children = [naive(rng, depth + 1, max_depth, max_args) for _ in range(rng.integers(2, max_args + 1))]
    return [f"[{OPERATORS[rng.integers(4)]}", *itertools.chain(*children), "X"]


@pytest.fixture(scope="module")
def trees():
    return data.trees("test", 0, N, **PUBLISHED)


@pytest.fixture(scope="module")
def small():
    return ListOps(protocol="fixed", **SMALL)


def test_labels_depths_and_lengths_are_those_of_a_recursive_reading(trees):
    for i in range(60):
        tokens = trees["tokens"][i, : trees["length"][i]]
        assert (trees["tokens"][i, trees["length"][i] :] == data.PAD).all()
        assert evaluate(words(tokens)) == (trees["label"][i], trees["depth"][i])


@pytest.mark.parametrize(("values", "median"), [((4, 5), 4), ((3, 5), 4), ((9, 1, 2), 2), ((0, 0, 9, 9), 4), ((7,), 7)])
def test_a_median_between_two_digits_is_cut_off(values, median):
    count = np.bincount(values, minlength=10)
    assert [data._apply(data.MIN + i, count) for i in range(4)] == [min(values), max(values), median, sum(values) % 10]


def test_statistics_of_the_published_bounds_are_those_measured_on_the_published_code(trees):
    """Reference: 12,000 trees of LRA's generator; tolerances are four standard errors of both samples together."""
    assert N / trees["drawn"] == pytest.approx(0.083, abs=0.004)
    assert trees["length"].mean() == pytest.approx(1043, abs=4 * 410 * (1 / N + 1 / 12000) ** 0.5)
    assert np.percentile(trees["length"], [5, 50, 95]) == pytest.approx([538, 968, 1812], rel=0.04)
    assert trees["length"].min() >= 501 and trees["length"].max() <= 1999
    assert (trees["depth"] == 9).all()
    share = np.bincount(trees["label"]) / N
    assert share[[0, 9]] == pytest.approx([0.17, 0.17], abs=0.02)
    assert (share[1:9] > 0.06).all() and (share[1:9] < 0.105).all()
    assert chisquare(np.bincount(trees["tokens"][:, 0], minlength=14)[10:]).pvalue > 1e-3


def test_short_trees_follow_the_law_of_a_recursive_sampler():
    """Kolmogorov-Smirnov on lengths, chi-square on labels, roots and number of root arguments; seeds are fixed."""
    law = dict(shortest=12, longest=60, max_depth=4, max_args=6)
    ours = data.trees("law", 0, N, **law)
    rng = np.random.default_rng(7)
    theirs, drawn = [], 0
    while len(theirs) < 2500:
        tree = naive(rng, max_depth=4, max_args=6)
        drawn += 1
        if 12 <= len(tree) <= 60:
            theirs.append(tree)

    def arity(tokens):
        depth, count = 0, 0
        for token in tokens[1:-1]:
            count += depth == 0 and token != "X"
            depth += token.startswith("[") - (token == "X")
        return count

    assert len(theirs) / drawn == pytest.approx(N / ours["drawn"], rel=0.08)
    assert ks_2samp(ours["length"], [len(tree) for tree in theirs]).pvalue > 0.01
    mine = [words(row[:size]) for row, size in zip(ours["tokens"], ours["length"], strict=True)]
    for of in (lambda t: evaluate(t)[0], lambda t: OPERATORS.index(t[0][1:]), arity, lambda t: evaluate(t)[1]):
        a, b = (np.bincount([of(tree) for tree in group], minlength=10) for group in (mine, theirs))
        seen = (a + b) > 40
        assert seen.sum() > 1
        expected = (a / a.sum())[seen]
        assert chisquare(b[seen], expected / expected.sum() * b[seen].sum()).pvalue > 1e-3


def test_floors_at_the_published_bounds_are_those_of_the_reference(trees):
    """17.2, 36.2, 47.9, 68.9 and 81.0 %, within four standard errors of both samples."""
    task = ListOps(protocol="fixed", min_length=501, max_length=1999, train=1, valid=1, test=1)
    half = N // 2
    parts = {name: slice(start, start + half) for name, start in (("train", 0), ("test", half))}
    splits = {
        name: [task._batch(**{key: trees[key][rows] for key in ("tokens", "label", "depth", "length")})]
        for name, rows in parts.items()
    }
    floors = task.solvers(splits)
    reference = [0.172, 0.362, 0.479, 0.689, 0.810]
    for (name, found), wanted in zip(floors.items(), reference, strict=True):
        error = (wanted * (1 - wanted) * (1 / half + 1 / 12000)) ** 0.5
        assert found == pytest.approx(wanted, abs=4 * error), name


def test_all_levels_give_the_value_itself(trees):
    tokens, lengths = trees["tokens"][:200], trees["length"][:200]
    assert (data.guessed(tokens, lengths, levels=9, num_votes=1) == trees["label"][:200]).all()


def test_example_k_does_not_depend_on_how_many_are_drawn():
    whole, part = data.trees("k", 0, 20, **PUBLISHED), data.trees("k", 13, 2, **PUBLISHED)
    assert (whole["tokens"][13:15] == part["tokens"]).all()
    assert (data.trees("other", 0, 20, **PUBLISHED)["label"] != whole["label"]).any()


def test_no_tree_stands_twice_in_or_across_splits():
    crowded = ListOps(
        protocol="fixed", min_length=4, max_length=5, max_depth=2, max_args=3, train=2000, valid=100, test=100
    )  # 4 * (10^2 + 10^3) trees there are, so many are drawn twice
    rows = [row.numpy().tobytes() for split in SPLITS for row in crowded.segments(split, 0)[0].inputs]
    assert len(set(rows)) == len(rows) == 2200


def test_more_trees_than_there_are_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_BENCHMARK_DATA", str(tmp_path))
    task = ListOps(protocol="fixed", min_length=4, max_length=4, max_depth=2, max_args=2, train=900, valid=1, test=1)
    with pytest.raises(ValueError, match="too few different trees have 4 to 4 tokens for 902 examples"):
        task.segments("train", 0)
    rare = dict(min_length=60, max_length=60, max_depth=10, max_args=2, train=9, valid=1, test=1)
    with pytest.raises(ValueError, match="fewer than one tree in 1,000,000 has 60 to 60 tokens"):
        ListOps(protocol="fixed", **rare).segments("test", 0)


def test_equal_arguments_give_equal_bytes_and_the_data_are_pinned(small, tmp_path, monkeypatch):
    first = [small.segments(split, 0)[0].sha256() for split in SPLITS]
    monkeypatch.setenv("ATTENTION_BENCHMARK_DATA", str(tmp_path))  # made again, not read
    assert [small.segments(split, 0)[0].sha256() for split in SPLITS] == first
    assert small.segments("test", 1)[0].sha256() != first[2]
    more = ListOps(protocol="fixed", **{**SMALL, "train": 500})
    assert more.segments("test", 0)[0].sha256() == first[2], "the size of train moves test"
    assert first[2]["inputs"].startswith("7c30b56a038976ab"), "other trees: bump ListOps.version"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_share_their_trees_and_keep_padding_apart(small, protocol):
    task = ListOps(protocol=protocol, **SMALL)
    own, other = task.segments("test", 0)[0], small.segments("test", 0)[0]
    assert task.id == f"listops/{protocol}" and own.inputs.shape[1] == task.spec.length
    assert task.spec.inputs.vocab_size == {"fixed": 16, "lra": 17, "s4": 18}[protocol]
    assert task.spec.length == {"fixed": 30, "lra": 31, "s4": 2048}[protocol]
    for i in range(len(own)):
        read = [PROTOCOLS[protocol][token] for token in own.inputs[i][own.key_mask[i]]]
        assert not any("pad" in word for word in read)
        assert {PROTOCOLS[protocol][token] for token in own.inputs[i][~own.key_mask[i]]} <= {"<pad>"}
        if protocol == "s4":
            assert read.pop() == "<eos>"
        assert read == words(other.inputs[i][other.key_mask[i]])
        assert evaluate(read)[0] == own.targets[i, 0]
        assert read[0] == f"[{OPERATORS[own.slices['operator'][i]]}" and len(read) == own.slices["length"][i]
    splits = {name: task.segments(name, 0) for name in SPLITS}
    assert task.solvers(splits) == small.solvers({name: small.segments(name, 0) for name in SPLITS})


def test_accuracy_is_counted_by_operator_depth_and_length(small):
    segment = small.segments("test", 0)[0]
    sums = (segment.slices["operator"] == OPERATORS.index("SM"))[:, None]
    predictions = torch.where(sums, (segment.targets.long() + 1) % 10, segment.targets.long())
    scores = {score.slice: score for score in small.score(predictions, segment)}
    assert scores["operator", "SM"].value == 0 and scores["operator", "SM"].count == int(sums.sum()) > 0
    assert scores["operator", "MIN"].value == 1
    assert scores["all", ""].value == pytest.approx(1 - int(sums.sum()) / len(segment))
    for key in ("operator", "depth", "length"):
        assert sum(score.count for (name, _), score in scores.items() if name == key) == len(segment)
    assert {value for key, value in scores if key == "length"} <= {"8-13", "14-19", "20-25", "26-30"}


def test_an_epoch_holds_every_tree_once(small):
    segments = small.segments("train", 0)
    batches = list(small.batches(segments, 64, torch.Generator().manual_seed(0)))
    rows = sorted(row.numpy().tobytes() for batch in batches for row in batch.inputs)
    assert rows == sorted(row.long().numpy().tobytes() for row in segments[0].inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(protocol="lar"), 'unknown protocol "lar"; nearest: lra'),
        (dict(min_length=3), "min_length must be a whole number of at least 4, got 3; nearest: 4"),
        (dict(min_length=40), "min_length must be at most 30, the longest tree of max_length=30"),
        (dict(max_depth=2, max_args=2), "min_length must be at most 4, the longest tree"),
        (dict(train=0), "train must be a whole number of at least 1, got 0"),
        (dict(protocol="s4", max_length=3000), "max_length=3000; nearest: 2047"),
    ],
)
def test_settings_without_trees_are_one_line(change, message):
    with pytest.raises(ValueError) as error:
        ListOps(**{"protocol": "fixed", **SMALL, **change})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_published_row_has_the_published_numbers():
    row = yaml.safe_load((Path(__file__).parents[2] / "conf" / "task" / "listops_lra.yaml").read_text())
    del row["_target_"]
    task = ListOps(**row)
    assert task.id == "listops/lra" and task.spec.length == 2000
    assert task._law == PUBLISHED and task.numbers == dict(train=96000, valid=2000, test=2000)


def test_an_unknown_split_is_one_line(small):
    with pytest.raises(ValueError, match='unknown split "dev"; there are: train, valid, test'):
        small.segments("dev", 0)
