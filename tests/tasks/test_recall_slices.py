"""Repeated n-grams and AR hits, against the definition in loops."""

import numpy as np
import pytest

from tasks import _recall_slices
from tasks._recall_slices import ar_hits, counts_in, ngrams, since_last


def text(seed, rows=7, length=41, kinds=4):
    """Windows (inputs, targets) of a text, the last of which is not full; and a training text."""
    draw = np.random.default_rng(seed)
    stream = draw.integers(kinds, size=rows * length + 1).astype(np.int16)
    inputs, targets = stream[:-1].reshape(rows, length), stream[1:].reshape(rows, length).copy()
    targets[-1, -13:] = -100
    return inputs, targets, draw.integers(kinds, size=1009).astype(np.uint8)


def naive(inputs, targets, train, order, rare):
    """Distance and AR hit of every target, as the sentence of the paper says it."""
    since, hits = np.zeros(targets.shape, int), np.zeros(targets.shape, bool)
    for row in range(len(targets)):
        tokens = [*inputs[row].tolist(), None]
        for t in range(targets.shape[1]):
            if targets[row, t] < 0 or t + 2 - order < 0:
                continue
            gram = [*tokens[t + 2 - order : t + 1], targets[row, t]]
            for s in range(t - 1, order - 3, -1):
                if [*tokens[s + 2 - order : s + 1], tokens[s + 1]] == gram:
                    since[row, t] = t - s
                    break
            if since[row, t]:
                count = sum(train[i : i + order].tolist() == gram for i in range(len(train) - order + 1))
                hits[row, t] = count <= rare
    return since, hits


@pytest.mark.parametrize(("order", "kinds", "rare"), [(2, 13, 5), (2, 4, 62), (3, 4, 15), (5, 2, 30)])
def test_distances_and_hits_follow_the_definition(order, kinds, rare, monkeypatch):
    inputs, targets, train = text(order, kinds=kinds)
    expected_since, expected_hits = naive(inputs, targets, train, order, rare)
    assert 0 < expected_hits.sum() < (expected_since > 0).sum(), "the threshold must decide"
    for chunk in (_recall_slices.CHUNK, 100):
        monkeypatch.setattr(_recall_slices, "CHUNK", chunk)
        since = since_last(inputs, targets, order)
        assert (since == expected_since).all()
        assert (ar_hits(inputs, targets, train, order, rare, since) == expected_hits).all()


def test_the_example_of_the_paper():
    """`Hakuna Matata ... Hakuna ->`: Matata can be looked up, unless train is full of it."""
    words = ["hakuna", "matata", "it", "means", "no", "worries", "hakuna", "matata"]
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokens = np.array([[ids[word] for word in words]])
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    since = since_last(inputs, targets, 2)
    assert since.tolist() == [[0, 0, 0, 0, 0, 0, 6]]
    train = np.array([ids["hakuna"], ids["matata"], ids["no"]] * 3)
    assert ar_hits(inputs, targets, train, 2, 3, since).tolist() == [[False] * 6 + [True]]
    assert not ar_hits(inputs, targets, train, 2, 2, since).any()


def test_rows_do_not_see_each_other_and_short_rows_have_no_ngram():
    inputs, targets = np.array([[1, 2], [1, 2]]), np.array([[2, 3], [2, 3]])
    assert not since_last(inputs, targets, 2).any()
    assert not since_last(inputs, targets, 6).any()
    assert not ar_hits(inputs, targets, np.array([1, 2]), 6, 9, since_last(inputs, targets, 6)).any()


def test_hashes_of_ngrams_do_not_collide():
    every = np.array(np.meshgrid(*[np.arange(60)] * 3)).reshape(3, -1)
    codes, known = ngrams(every[:2].T, np.stack([every[1], every[2]], 1), 3)
    assert known.all() and len(set(codes.ravel().tolist())) == 60**3 and codes.min() >= 0


def test_counts_are_of_the_whole_text_across_pieces(monkeypatch):
    monkeypatch.setattr(_recall_slices, "CHUNK", 10)
    train = np.array([1, 2, 3] * 21)
    codes, _ = ngrams(np.array([[1], [3], [9]]), np.array([[2], [1], [9]]), 2)
    assert counts_in(train, codes[:, 0], 2).tolist() == [21, 20, 0]
