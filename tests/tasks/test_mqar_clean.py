"""The law of our own MQAR data, against exact probabilities and against the published generator."""

import numpy as np
import pytest
import torch
from scipy import stats

from tasks._mqar_data import clean, distinct, published, race
from tasks._mqar_segments import Segment

P_MIN = 1e-3  # seeds are fixed: a test that passes once passes always


def segment(length, pairs, examples):
    return Segment(length=length, num_pairs=pairs, num_examples=examples)


def draw(length, pairs, examples, vocab_size, power_a=0.01, seed=11):
    return clean(segment(length, pairs, examples), vocab_size, power_a, np.random.default_rng(seed))


def slots_by_pair(batch):
    """[N, K]: slot of the j-th pair, recovered from positions and distances."""
    pairs = batch.positions.shape[1]
    positions, distance = batch.positions.long(), batch.slices["distance"].long()
    pair = (positions - distance) // 2
    return torch.empty_like(positions).scatter_(1, pair, (positions - 2 * pairs) // 2).numpy()


def p_value(observed, probability):
    return stats.chisquare(observed, np.asarray(probability) * np.sum(observed)).pvalue


def same_law(a, b, size):
    """p of two samples of 0 .. size - 1 having one law; cells below ten are pooled."""
    table = np.array([np.bincount(a, minlength=size), np.bincount(b, minlength=size)])
    small = table.sum(0) < 10
    table = np.column_stack([table[:, ~small], table[:, small].sum(1)])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_slot_of_the_first_pair_follows_the_power_law(power_a):
    slot = slots_by_pair(draw(64, 4, 40_000, 66, power_a))[:, 0]
    law = np.arange(1, 29, dtype=float) ** (power_a - 1)
    assert p_value(np.bincount(slot, minlength=28), law / law.sum()) > P_MIN


def test_slots_of_the_first_two_pairs_are_drawn_without_replacement():
    slots = slots_by_pair(draw(24, 4, 40_000, 66))
    p = np.arange(1, 9, dtype=float) ** -0.99
    p /= p.sum()
    joint = p[:, None] * p / (1 - p[:, None])  # first i, then j among those left
    np.fill_diagonal(joint, 0)
    observed = np.zeros((8, 8))
    np.add.at(observed, (slots[:, 0], slots[:, 1]), 1)
    off = ~np.eye(8, dtype=bool)
    assert observed[~off].sum() == 0
    assert p_value(observed[off], joint[off]) > P_MIN


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (128, 8)])
def test_slots_of_every_pair_match_the_published_generator(length, pairs):
    ours = slots_by_pair(draw(length, pairs, 20_000, 130))
    theirs = slots_by_pair(published(segment(length, pairs, 6_000), 130, 0.01, 3, None))
    size = (length - 2 * pairs) // 2
    for pair in range(pairs):
        assert same_law(ours[:, pair], theirs[:, pair], size) > P_MIN / pairs


def test_race_without_weights_is_a_uniform_permutation():
    order = race(np.random.default_rng(2), 24_000, np.ones(4))
    assert (np.sort(order, 1) == np.arange(4)).all()
    assert p_value(np.unique(order @ [64, 16, 4, 1], return_counts=True)[1], np.full(24, 1 / 24)) > P_MIN


@pytest.mark.parametrize("population", [5, 13])  # by race, and by drawing repeats again
def test_distinct_tuples_are_uniform(population):
    drawn = distinct(np.random.default_rng(4), 60_000, 3, population)
    code, count = np.unique(drawn @ [population**2, population, 1], return_counts=True)
    tuples = population * (population - 1) * (population - 2)
    assert len(code) == tuples
    assert p_value(count, np.full(tuples, 1 / tuples)) > P_MIN


@pytest.mark.parametrize("vocab_size", [40, 130])
def test_keys_and_values_are_distinct_and_uniform_over_their_halves(vocab_size):
    batch, half = draw(44, 7, 9_000, vocab_size), vocab_size // 2
    context = batch.inputs[:, :14].numpy()
    for tokens, first, size in ((context[:, 0::2], 1, half - 1), (context[:, 1::2], half, half)):
        assert (np.diff(np.sort(tokens, 1), axis=1) > 0).all()
        for column in (0, 6):
            counts = np.bincount(tokens[:, column] - first, minlength=size)
            assert len(counts) == size
            assert p_value(counts, np.full(size, 1 / size)) > P_MIN


def filler_of(batch, pairs):
    """Filler tokens [N, L - 3K], and the sorted keys [N, K]."""
    n, length = batch.inputs.shape
    is_filler = torch.ones(n, length, dtype=torch.bool)
    is_filler[:, : 2 * pairs] = False
    is_filler.scatter_(1, batch.positions.long(), False)
    return batch.inputs[is_filler].reshape(n, -1).numpy(), np.sort(batch.inputs[:, : 2 * pairs : 2].numpy(), 1)


@pytest.mark.parametrize("vocab_size", [16, 8192])
def test_filler_is_never_a_key_of_its_sequence(vocab_size):
    filler, keys = filler_of(draw(44, 7, 5_000, vocab_size), 7)
    assert not (filler[:, :, None] == keys[:, None, :]).any()


def test_filler_is_uniform_over_all_other_tokens():
    filler, keys = filler_of(draw(44, 5, 4_000, 16), 5)
    rank = filler - (keys[:, None, :] < filler[:, :, None]).sum(-1)  # of a token among those that are not keys
    for columns in (rank, rank[:, :1], rank[:, -1:]):  # all, the first and the last
        assert p_value(np.bincount(columns.ravel(), minlength=11), np.full(11, 1 / 11)) > P_MIN


def test_filler_tokens_are_independent_of_their_neighbours():
    filler, keys = filler_of(draw(44, 5, 4_000, 16), 5)
    rank = filler - (keys[:, None, :] < filler[:, :, None]).sum(-1)
    pairs = (11 * rank[:, 0:28:2] + rank[:, 1:28:2]).ravel()
    assert p_value(np.bincount(pairs, minlength=121), np.full(121, 1 / 121)) > P_MIN


def test_a_sequence_can_be_full_of_keys():
    batch = draw(20, 5, 300, 12)  # all 5 keys, all 5 slots
    assert (np.sort(batch.inputs[:, :10:2].numpy(), 1) == np.arange(1, 6)).all()
    assert (batch.positions == torch.arange(10, 20, 2)).all()
    filler, _ = filler_of(batch, 5)
    assert set(np.unique(filler)) == {0, 6, 7, 8, 9, 10, 11}


def test_chunks_of_a_long_segment_differ():
    batch = draw(64, 4, 9_000, 258)
    assert len(batch.inputs.unique(dim=0)) == 9_000
