"""Duplicates and splits: what MinHash finds against all pairs, and cuts that keep classes and groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tasks import _disjoint
from tasks._disjoint import distinct, groups_of, plain, stratified, text_pairs, vector_pairs

SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}


def shingles(text: str, width: int) -> set[str]:
    return {text[i : i + width] for i in range(max(1, len(text) - width + 1))}


def corpus(rng: np.random.Generator, texts: int, edits: int) -> list[str]:
    """Random sentences, and copies of them with up to `edits` words replaced."""
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(60)]
    found = [list(rng.choice(words, size=rng.integers(1, 60))) for _ in range(texts)]
    for original in found[: texts // 2]:
        copy = list(original)
        for place in rng.integers(len(copy), size=rng.integers(0, edits)):
            copy[place] = str(rng.choice(words))
        found.append(copy)
    return [" ".join(text) for text in found]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_pairs_of_texts_are_those_of_comparing_all_with_all(threshold):
    texts = list(dict.fromkeys(corpus(np.random.default_rng(int(threshold * 10)), texts=90, edits=4)))
    sets = [shingles(text, 5) for text in texts]
    wanted = [
        (a, b)
        for a, b in itertools.combinations(range(len(texts)), 2)
        if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= threshold
    ]
    assert len(wanted) > 5, "the corpus has near duplicates"
    assert list(map(tuple, text_pairs(texts, threshold).tolist())) == wanted


def test_equal_texts_are_paired_with_the_first_whatever_their_case_and_punctuation():
    texts = ["What is it?", "another question altogether", "what  is it", "WHAT IS IT!!", "what is it, then and now?"]
    assert text_pairs(texts, 1.0).tolist() == [[0, 2], [0, 3]]
    assert text_pairs(texts, 1.0, normalise=str).tolist() == []
    assert plain("  Où est-il ?\n") == "où est il"


def test_short_and_empty_texts_are_compared_as_a_whole():
    assert text_pairs(["ab", "ac", "", "ab", ""], 0.5).tolist() == [[0, 3], [2, 4]]
    assert text_pairs([], 0.5).shape == (0, 2)


def test_the_length_of_bands_follows_from_the_chance_to_overlook_a_pair():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        rows = _disjoint._rows_of_a_band(threshold)
        miss = [(1 - threshold**r) ** (_disjoint.PERMUTATIONS // r) for r in (rows, rows + 1)]
        assert miss[0] <= _disjoint.MISSED < miss[1]


def test_signatures_agree_as_often_as_the_sets_overlap():
    rng = np.random.default_rng(3)
    agree = []
    for _ in range(60):
        pool = rng.integers(2**63, size=120, dtype=np.uint64)
        a, b = _disjoint._signature(pool[:90]), _disjoint._signature(pool[30:])  # Jaccard 60 / 120
        agree.append((a == b).mean())
    assert np.mean(agree) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(60 * 128))


def test_pairs_of_vectors_are_those_of_comparing_all_with_all():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 4, size=(70, 3, 2)).astype(np.uint8)
    flat = images.reshape(70, -1).astype(float)
    gaps = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    wanted = {(a, b) for a, b in itertools.combinations(range(70), 2) if gaps[a, b] <= 2.0}
    copies = {(a, b) for a, b in wanted if gaps[a, b] == 0}
    found = set(map(tuple, vector_pairs(images, 2.0).tolist()))
    assert found == wanted and not copies
    assert any(gaps[pair] == 2.0 for pair in wanted), "the threshold itself is inside"
    twice = np.concatenate([images, images[:5]])
    assert vector_pairs(twice, 0.0).tolist() == [[i, 70 + i] for i in range(5)]


def test_groups_are_chains_of_pairs_and_the_first_of_each_is_kept():
    pairs = np.array([[7, 9], [1, 5], [5, 7], [2, 3]])
    assert groups_of(10, pairs).tolist() == [0, 1, 2, 2, 4, 1, 6, 1, 8, 1]
    assert distinct(10, pairs).tolist() == [0, 1, 2, 4, 6, 8]
    long = np.stack([np.arange(999), np.arange(1, 1000)], 1)[::-1]
    assert (groups_of(1000, long) == 0).all()
    assert distinct(4, np.empty((0, 2), np.int64)).tolist() == [0, 1, 2, 3]


def test_kept_texts_are_no_pairs():
    texts = corpus(np.random.default_rng(1), texts=60, edits=3)
    kept = distinct(len(texts), text_pairs(texts, 0.6))
    assert 0 < len(kept) < len(texts)
    assert len(text_pairs([texts[row] for row in kept], 0.6)) == 0


def test_a_cut_keeps_the_share_of_every_class_within_one_row():
    labels = np.repeat([4, 0, 7], [1000, 100, 33])
    cut = stratified(labels, SHARES)
    assert np.array_equal(np.sort(np.concatenate(list(cut.values()))), np.arange(len(labels)))
    for split, rows in cut.items():
        for label, count in ((4, 1000), (0, 100), (7, 33)):
            assert abs((labels[rows] == label).sum() - SHARES[split] * count) <= 1
        assert (np.diff(rows) > 0).all()


def test_members_of_a_group_stay_together_and_shares_hold():
    rng = np.random.default_rng(5)
    groups = rng.integers(300, size=1500) * 7  # numbers with gaps
    labels = (groups % 3 + (rng.random(1500) < 0.1)) % 3  # most groups, not all, have one class
    cut = stratified(labels, SHARES, groups=groups)
    sides = [set(groups[rows].tolist()) for rows in cut.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    for split, rows in cut.items():
        for label in range(3):
            assert abs((labels[rows] == label).sum() / (labels == label).sum() - SHARES[split]) < 0.02


def test_a_cut_depends_on_its_seed_and_on_nothing_else():
    labels = np.arange(200) % 5
    one, same, other = (stratified(labels, SHARES, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[split], same[split]) for split in SHARES)
    assert not np.array_equal(one["test"], other["test"])


def test_bad_values_are_one_line():
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1, got 80"):
        text_pairs(["a"], 80)
    with pytest.raises(ValueError, match="distance must be 0 or more, got -1"):
        vector_pairs(np.zeros((2, 2)), -1)
    with pytest.raises(ValueError, match="shares must be 0 or more and add up to 1"):
        stratified(np.zeros(3, int), {"train": 0.7, "test": 0.2})
