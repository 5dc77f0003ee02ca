"""Induction heads and selective copying at many lengths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tasks.base import IGNORE
from tasks.induction import Induction, SelectiveCopying


def induction(n=300, **changes):
    short, long = {"length": 9, "num_examples": n}, {"length": 23, "num_examples": n}
    return Induction(**{"vocab_size": 7, "train": [short], "valid": [short], "test": [short, long], **changes})


def copying(n=300, **changes):
    short = {"length": 13, "num_copies": 3, "num_examples": n}
    long = {"length": 29, "num_copies": 5, "num_examples": n}
    return SelectiveCopying(**{"vocab_size": 7, "train": [short], "valid": [short], "test": [short, long], **changes})


def test_the_special_token_stands_twice_and_its_follower_is_due():
    for segment in induction().segments("test", 0):
        for tokens, labels in zip(segment.inputs.tolist(), segment.labels().tolist(), strict=True):
            first = tokens.index(6)
            assert tokens.count(6) == 2 and tokens[-1] == 6 and first + 1 < len(tokens) - 1
            assert labels == [IGNORE] * (len(tokens) - 1) + [tokens[first + 1]]


def test_its_place_and_the_answer_are_uniform():
    segment = induction(6000).segments("train", 0)[0]
    places = (segment.inputs.numpy() == 6).argmax(1)
    assert stats.chisquare(np.bincount(places)).pvalue > 1e-3 and len(set(places.tolist())) == 7
    assert stats.chisquare(np.bincount(segment.targets[:, 0].numpy(), minlength=6)).pvalue > 1e-3
    assert (segment.slices["distance"][:, 0].numpy() == 8 - places).all()


def test_copies_are_due_in_order_after_the_copy_token():
    for segment, copies in zip(copying().segments("test", 0), (3, 5), strict=True):
        for tokens, labels in zip(segment.inputs.tolist(), segment.labels().tolist(), strict=True):
            body = len(tokens) - copies - 1
            content = [token for token in tokens[:body] if token != 5]
            assert len(content) == copies and max(content) < 5
            assert tokens[body:] == [6] + [5] * copies and labels == [IGNORE] * (body + 1) + content


@pytest.mark.parametrize("make", [induction, copying])
def test_splits_differ_and_equal_arguments_give_equal_bytes(make):
    seen = set()
    for split in ("train", "valid", "test"):
        assert [s.sha256() for s in make().segments(split, 0)] == [s.sha256() for s in make().segments(split, 0)]
        own = {tuple(row) for segment in make().segments(split, 0) for row in segment.inputs.tolist()}
        assert not own & seen
        seen |= own


def test_floors_of_short_sequences_are_known():
    built = induction(2000)
    splits = {split: built.segments(split, 0)[:1] for split in ("train", "test")}
    floors = built.solvers(splits)
    assert floors["majority"] == pytest.approx(1 / 6, abs=0.04)
    # the last ordinary token is the answer itself when the special one stood right before it: 1 in 7 places
    assert floors["latest_answer"] == pytest.approx(1 / 7 + 6 / 7 / 6, abs=0.04)
    assert floors["most_frequent_answer"] > floors["majority"]


def test_scores_are_told_apart_by_length():
    built = copying()
    long = built.segments("test", 0)[1]
    scores = {s.slice: s.value for s in built.score(long.targets.where(long.targets != long.targets[0, 0], -1), long)}
    assert scores["length", "29"] == pytest.approx(scores["all", ""]) and scores["all", ""] < 1
    assert ("order", "2-3") in scores


def test_the_data_are_pinned():
    found = [make().segments("test", 0)[0].sha256()["inputs"][:8] for make in (induction, copying)]
    assert found == ["11379d9b", "984262ac"], "other data: bump the version"


def test_settings_without_data_are_one_line():
    with pytest.raises(ValueError, match=r"test\[0\].length must be a whole number of at least 3, got 2"):
        induction(test=[{"length": 2, "num_examples": 1}])
    with pytest.raises(ValueError, match=r"train\[0\].length must be above .* nearest: length=8"):
        copying(train=[{"length": 7, "num_copies": 3, "num_examples": 1}])
    with pytest.raises(ValueError, match="vocab_size must be a whole number of at least 3"):
        induction(vocab_size=2)
