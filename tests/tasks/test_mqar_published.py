"""The published MQAR data, bit for bit: hashes of their generator's output, and its slow equivalent."""

import numpy as np
import pytest
import torch

from tasks._mqar_data import published
from tasks._mqar_segments import Segment
from tasks.base import IGNORE
from tasks.mqar import MQAR

V = 8192


def segment(length, pairs, examples):
    return Segment(length=length, num_pairs=pairs, num_examples=examples)


def settings(*cells):
    return [{"length": length, "num_pairs": pairs, "num_examples": n} for length, pairs, n in cells]


def slow(length, pairs, examples, vocab_size, seed, filler=None, power_a=0.01):
    """One example after the other with legacy `choice`, three passes; filler [N, L] replaces every 0."""
    random = np.random.RandomState(seed)
    half, slots = vocab_size // 2, (length - 2 * pairs) // 2
    keys = [random.choice(np.arange(1, half), size=pairs, replace=False) for _ in range(examples)]
    values = [random.choice(np.arange(half, vocab_size), size=pairs, replace=False) for _ in range(examples)]
    p = power_a * np.arange(1, slots + 1) ** (power_a - 1)
    p = p / p.sum()
    gaps = [random.choice(np.arange(slots), size=pairs, replace=False, p=p) for _ in range(examples)]
    inputs = np.zeros((examples, length), np.int64)
    labels = np.full((examples, length), IGNORE, np.int64)
    for i in range(examples):
        for j in range(pairs):
            inputs[i, 2 * j], inputs[i, 2 * j + 1] = keys[i][j], values[i][j]
            inputs[i, 2 * pairs + 2 * gaps[i][j]] = keys[i][j]
            labels[i, 2 * pairs + 2 * gaps[i][j]] = values[i][j]
    if filler is not None:
        inputs = np.where(inputs == 0, filler.numpy(), inputs)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def assert_equal_to_slow(batch, expected):
    inputs, labels = expected
    assert torch.equal(batch.inputs.long(), inputs)
    assert torch.equal(batch.labels(), labels)


@pytest.mark.parametrize(
    ("length", "pairs", "examples", "seed", "inputs", "labels"),
    [
        (64, 4, 1000, 0, "edd63b6b2bce8da8", "5762007fc1d1591f"),
        (128, 8, 1000, 0, "d1308a381e71de38", "f17dab31ae90d628"),
        (64, 4, 3000, 3062119789, "b4432bc3e79f5d7a", "ee0c7d6d16067b10"),
        (128, 8, 3000, 3062119789, "20b587cc9942f1f6", "43ef3564b0b8cffb"),
        (256, 16, 3000, 3062119789, "a71cfcd53373e1e7", "b1130b6d2a0ac618"),
        (512, 64, 3000, 3062119789, "fafa6cfdcf01eecd", "208d994cf4a0d792"),
    ],
)
def test_generator_has_the_published_hashes(length, pairs, examples, seed, inputs, labels):
    batch = published(segment(length, pairs, examples), V, 0.01, seed, None)
    assert {name: value[:16] for name, value in batch.sha256().items()} == {"inputs": inputs, "labels": labels}
    if examples == 3000:  # a permutation does not depend on how much of it is kept
        assert batch.inputs[0, :4].tolist() == [2698, 4262, 1271, 4541]


def test_published_training_set_of_100000_has_its_hash_and_first_row():
    batch = published(segment(64, 4, 100_000), V, 0.01, 843828734, None)
    assert {name: value[:16] for name, value in batch.sha256().items()} == {
        "inputs": "c8dc7aefd250c5a5",
        "labels": "c1dc34fe5da58221",
    }
    assert batch.inputs[0, :8].tolist() == [739, 6356, 3514, 7038, 3106, 6392, 983, 5675]
    assert batch.positions[0].tolist() == [8, 12, 14, 20]
    assert batch.targets[0].tolist() == [6356, 6392, 5675, 7038]


def test_two_tiny_rows_are_as_published():
    batch = published(segment(8, 2, 2), 12, 0.01, 0, None)
    assert batch.inputs.tolist() == [[3, 7, 1, 9, 1, 0, 3, 0], [1, 9, 3, 11, 1, 0, 3, 0]]
    assert batch.positions.tolist() == [[4, 6], [4, 6]]
    assert batch.targets.tolist() == [[9, 7], [9, 11]]


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (44, 5), (52, 13)])  # 13 pairs use all 13 slots
@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_generator_equals_legacy_choice_row_by_row(length, pairs, power_a):
    tokens = torch.randint(98, (37, length), generator=torch.Generator().manual_seed(5))
    batch = published(segment(length, pairs, 37), 98, power_a, 7, torch.Generator().manual_seed(5))
    assert_equal_to_slow(batch, slow(length, pairs, 37, 98, 7, tokens, power_a))


def test_filler_drawn_in_chunks_equals_one_draw():
    examples = 2**20 // 64 + 3  # more than one chunk
    tokens = torch.randint(66, (examples, 64), generator=torch.Generator().manual_seed(5))
    batch = published(segment(64, 2, examples), 66, 0.01, 7, torch.Generator().manual_seed(5))
    odd = slice(5, None, 2)  # never a query
    assert torch.equal(batch.inputs[:, odd].long(), tokens[:, odd])


def test_iclr24_trains_on_seed_0_and_tests_on_seed_10_with_filler_0():
    cell = settings((64, 4, 1000))
    task = MQAR(protocol="zoology_iclr24", vocab_size=V, train=cell, valid=cell, test=settings((64, 4, 29)))
    assert task.segments("train", 3)[0].sha256()["inputs"].startswith("edd63b6b2bce8da8")
    assert_equal_to_slow(task.segments("test", 3)[0], slow(64, 4, 29, V, 10))


TRAIN_SEEDS = 843828734, 914636141, 1228959102, 1840268610, 974319580
TEST_SEEDS = 2967327842, 2367878886, 3088727057, 3090095699, 4256823402, 3964712059, 3350193721
TRAIN = (64, 4, 13), (128, 8, 7), (256, 16, 5), (256, 32, 3), (256, 64, 2)
TEST = (64, 4, 3), (64, 8, 3), (64, 16, 3), (128, 32, 3), (256, 64, 3), (512, 128, 2), (1024, 256, 1)


def based_mix():
    return MQAR(protocol="based_mix", vocab_size=V, train=settings(*TRAIN), valid=settings(*TEST), test=settings(*TEST))


def test_based_mix_follows_the_published_seeds_and_one_filler_stream_through_train_and_test():
    task = based_mix()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)  # the published code reads the global stream
        expected = [
            slow(*cell, V, seed, torch.randint(V, (cell[2], cell[0])))
            for cell, seed in zip(TRAIN + TEST, TRAIN_SEEDS + TEST_SEEDS, strict=True)
        ]
    test, train = task.segments("test", 0), task.segments("train", 0)  # in this order: neither needs the other
    assert len(train + test) == len(expected) == 12
    for batch, rows in zip(train + test, expected, strict=True):
        assert_equal_to_slow(batch, rows)


def test_valid_of_based_mix_repeats_no_filler_of_train():
    cell = settings((64, 4, 41))
    task = MQAR(protocol="based_mix", vocab_size=V, train=cell, valid=cell, test=cell)
    train, valid, test = (task.segments(split, 0)[0].inputs[:, 9::2] for split in ("train", "valid", "test"))
    for other in (train, test):  # filler alone; equal by chance in one of 8192
        assert (valid == other).double().mean() < 0.01


@pytest.mark.parametrize("protocol", ["zoology_iclr24", "based_mix"])
def test_published_data_do_not_depend_on_the_seed_and_valid_is_drawn_apart(protocol):
    cell = settings((64, 4, 41))
    task = MQAR(protocol=protocol, vocab_size=V, train=cell, valid=cell * 2, test=cell)
    hashes = [
        [batch.sha256() for split in ("train", "valid", "test") for batch in task.segments(split, s)] for s in (0, 1)
    ]
    assert hashes[0] == hashes[1]
    assert len({entry["inputs"] for entry in hashes[0]}) == 4
    valid = task.segments("valid", 0)[0]
    assert (valid.inputs == 0).any() == (protocol == "zoology_iclr24")
    longer = MQAR(protocol=protocol, vocab_size=V, train=cell, valid=cell * 3, test=cell)
    assert longer.segments("test", 0)[0].sha256() == hashes[0][3] == task.segments("test", 0)[0].sha256()
