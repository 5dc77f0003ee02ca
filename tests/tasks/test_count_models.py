"""Witten-Bell count models against the formula in loops."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from tasks._count_models import interpolated, successive

V = 5


def naive(train, history, token):
    """p(token | history), history newest first, by the recursion."""
    if history is None:
        return 1 / V
    followers = Counter(t for h, t in train[len(history)] if h == history)
    shorter = naive(train, history[:-1] if history else None, token)
    total, kinds = sum(followers.values()), len(followers)
    return (followers[token] + kinds * shorter) / (total + kinds) if total else shorter


def test_probabilities_follow_the_formula():
    draw = np.random.default_rng(0)
    train, test = draw.integers(4, size=83), draw.integers(V, size=47)
    known = defaultdict(list)
    context, target = successive(train, 3)
    for n in range(3):
        known[n] = [(tuple(int(c[i]) for c in context[:n]), int(target[i])) for i in range(len(target))]
    asked, wanted = successive(test, 3)
    results = list(interpolated((context, target), (asked, wanted), V))
    assert len(results) == 3
    for n, nats in enumerate(results):
        for i in range(len(wanted)):
            history = tuple(int(c[i]) for c in asked[:n])
            assert nats[i] == pytest.approx(-math.log(naive(known, history, int(wanted[i]))))


def test_probabilities_of_all_tokens_add_up_to_one():
    train = successive(np.random.default_rng(1).integers(V, size=61), 3)
    for history in ([0, 1], [4, 4], [2, 3]):
        asked = [np.full(V, token) for token in history], np.arange(V)
        for nats in interpolated(train, asked, V):
            assert np.exp(-nats).sum() == pytest.approx(1)


def test_contexts_of_a_stream_are_its_tokens_newest_first():
    context, target = successive(np.array([7, 8, 9, 6]), 3)
    assert target.tolist() == [8, 9, 6] and [c.tolist() for c in context] == [[7, 8, 9], [7, 7, 8]]
    context, target = successive(np.array([7, 8, 9, 6]), 1)
    assert target.tolist() == [8, 9, 6] and not context


def test_a_period_is_learned_by_the_model_that_sees_it():
    stream = np.tile([0, 1, 0, 2], 500)  # what follows 0 depends on the token before
    unigram, bigram, trigram = (nats.mean() for nats in interpolated(*[successive(stream, 3)] * 2, V))
    assert unigram == pytest.approx(math.log(2) * 1.5, abs=0.01)
    assert bigram == pytest.approx(math.log(2) / 2, abs=0.01)
    assert trigram == pytest.approx(0, abs=0.01)
