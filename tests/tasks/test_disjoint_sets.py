"""Set disjointness: one token in both lists, either order, read once or twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tasks.base import IGNORE
from tasks.disjoint_sets import DisjointSets


def both(n=200):
    return [{"first": 3, "second": 5, "num_examples": n}, {"first": 5, "second": 3, "num_examples": n}]


def make(vocab_size=13, n=200, **changes):
    return DisjointSets(vocab_size=vocab_size, **{"train": both(n), "valid": both(n), "test": both(n), **changes})


def test_the_lists_share_exactly_the_answer():
    for segment, first in zip(make().segments("train", 0), (3, 5), strict=True):
        for tokens, labels in zip(segment.inputs.tolist(), segment.labels().tolist(), strict=True):
            assert len(tokens) == 11 and (tokens[0], tokens[first + 1], tokens[-1]) == (1, 2, 3)
            left, right = tokens[1 : first + 1], tokens[first + 2 : -1]
            assert len(set(left)) == first and len(set(right)) == 8 - first and min(left + right) >= 4
            assert set(left) & set(right) == {labels[-1]} and set(labels[:-1]) == {IGNORE}


def test_the_answer_and_its_places_are_uniform():
    segment = make(n=4000).segments("train", 0)[0]
    answer = segment.targets[:, 0].numpy()
    assert stats.chisquare(np.bincount(answer - 4)).pvalue > 1e-3
    inputs = segment.inputs.numpy()
    place = (inputs[:, 1:4] == answer[:, None]).argmax(1)
    assert stats.chisquare(np.bincount(place)).pvalue > 1e-3
    there = (inputs[:, 5:10] == answer[:, None]).argmax(1)
    assert stats.chisquare(np.bincount(there)).pvalue > 1e-3
    assert (segment.slices["distance"][:, 0].numpy() == 10 - (5 + there)).all()


def test_read_twice_it_is_the_same_input_twice():
    once, twice = make().segments("test", 0)[1], make(repeats=2).segments("test", 0)[1]
    assert torch.equal(twice.inputs, once.inputs.repeat(1, 2)) and torch.equal(twice.targets, once.targets)
    assert (twice.positions == 21).all() and make(repeats=2).spec.length == 22
    assert make(repeats=2).id == "disjoint_sets/clean,repeats=2"


def test_scores_tell_the_order_and_floors_are_one_in_the_short_list():
    built = make()
    splits = {split: built.segments(split, 0) for split in ("train", "test")}
    right = built.score(splits["test"][0].targets, splits["test"][0])
    assert {s.slice for s in right} >= {("order", "short_first"), ("short", "3"), ("length", "11")}
    assert all(score.value == 1 for score in right)
    assert ("order", "long_first") in {s.slice for s in built.score(splits["test"][1].targets, splits["test"][1])}
    floors = built.solvers(splits)
    assert floors["first_of_the_short_list"] == pytest.approx(1 / 3, abs=0.08)
    assert floors["majority"] == pytest.approx(1 / 9, abs=0.06)


def test_splits_differ_and_the_data_are_pinned():
    seen = set()
    for split in ("train", "valid", "test"):
        own = {tuple(row) for segment in make().segments(split, 0) for row in segment.inputs.tolist()}
        assert not own & seen
        seen |= own
    assert make().segments("test", 0)[0].sha256()["inputs"][:8] == "2009c34a", "other data: bump DisjointSets.version"


def test_settings_without_data_are_one_line():
    with pytest.raises(ValueError, match=r"first .* at most 8 with vocab_size=11, got 9; nearest: vocab_size=12"):
        make(vocab_size=11, test=[{"first": 4, "second": 5, "num_examples": 3}])
    with pytest.raises(ValueError, match=r"test\[0\] must have the keys of .*first: 16"):
        make(test=[{"short": 4, "second": 5, "num_examples": 3}])
    with pytest.raises(ValueError, match='unknown split "dev"'):
        make().segments("dev", 0)
