"""The MQAR task: what its sequences mean, splits, batches, scores and refused settings."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tasks.base import IGNORE, SPLITS, Score
from tasks.mqar import MQAR, PROTOCOLS

TASKS = Path(__file__).parents[2] / "conf" / "task"
YAMLS = [path for path in sorted(TASKS.glob("mqar*.yaml")) if "tasks.mqar.MQAR\n" in path.read_text()]
CELLS = (12, 2, 23), (12, 3, 17), (20, 5, 19)


def settings(*cells):
    return [{"length": length, "num_pairs": pairs, "num_examples": n} for length, pairs, n in cells]


def make(protocol="clean", **changes):
    cells = CELLS[2:] if protocol == "zoology_iclr24" else CELLS
    given = {"vocab_size": 64, "train": settings(*cells), "valid": settings(*CELLS), "test": settings(*cells)} | changes
    return MQAR(protocol=protocol, **given)


def examples(batch):
    """Every example as (inputs, labels) bytes, sorted: the multiset of a batch."""
    both = torch.cat([batch.inputs.long(), batch.labels()], 1)
    return sorted(row.numpy().tobytes() for row in both)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# -- data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_query_repeats_a_key_and_its_label_is_the_value_of_that_key(protocol):
    for split in SPLITS:
        cells = CELLS[2:] if protocol == "zoology_iclr24" and split != "valid" else CELLS
        for batch, (length, pairs, n) in zip(make(protocol).segments(split, 0), cells, strict=True):
            assert batch.inputs.shape == (n, length) and batch.positions.shape == batch.targets.shape == (n, pairs)
            for row in range(n):
                tokens = batch.inputs[row].tolist()
                value = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
                positions = batch.positions[row].tolist()
                assert positions == sorted(set(positions)) and positions[0] >= 2 * pairs
                assert sorted(tokens[p] for p in positions) == sorted(value)
                for order, p in enumerate(positions):
                    assert p % 2 == 0
                    assert batch.targets[row, order] == value[tokens[p]]
                    assert batch.slices["distance"][row, order] == p - tokens.index(tokens[p])
                    assert batch.slices["order"][row, order] == order
                assert (batch.labels()[row] != IGNORE).sum() == pairs
                assert batch.slices["pairs"][row] == pairs and batch.slices["length"][row] == length


def test_spec_says_what_a_backbone_needs():
    task = make()
    assert task.id == "mqar/clean" and task.version == 1
    assert task.spec.inputs.vocab_size == task.spec.output.num_classes == 64
    assert task.spec.length == 20 and task.spec.causal
    assert task.spec.chance == 1 / 32  # 32 value tokens
    assert task.spec.metrics["accuracy"].unit == "fraction" and task.spec.metrics["loss"].unit == "nats"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**15, torch.int16), (2**15 + 2, torch.int32)])
@pytest.mark.parametrize("protocol", ["clean", "based_mix"])
def test_tokens_are_stored_in_the_smallest_type_and_reach_the_model_as_int64(protocol, vocab_size, dtype):
    task = make(protocol, vocab_size=vocab_size, train=settings((12, 3, 400)))
    (segment,) = task.segments("train", 0)
    assert segment.inputs.dtype == segment.targets.dtype == segment.positions.dtype == dtype
    assert segment.inputs.min().item() >= 0 and vocab_size // 2 < segment.inputs.max().item() < vocab_size
    batch = segment.rows(slice(0, 3))
    assert {t.dtype for t in (batch.inputs, batch.positions, batch.targets, *batch.slices.values())} == {torch.int64}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_splits_share_no_row(protocol):
    same = settings((20, 5, 500))
    task = make(protocol, train=same, valid=same, test=same)
    rows = [set(examples(batch)) for split in SPLITS for batch in task.segments(split, 0)]
    assert [len(r) for r in rows] == [500, 500, 500]
    assert len(set.union(*rows)) == 1500


def test_seeds_and_repeated_segments_share_no_row():
    task = make(train=settings((20, 5, 500), (20, 5, 500)))
    rows = [set(examples(batch)) for seed in (0, 1) for batch in task.segments("train", seed)]
    assert len(set.union(*rows)) == 2000


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_equal_arguments_give_equal_bytes_and_global_generators_are_untouched(protocol):
    first = [[b.sha256() for b in make(protocol).segments(split, 5)] for split in SPLITS]
    np.random.seed(1)  # noqa: NPY002 - the state that must stay
    torch.manual_seed(2)
    before = repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    again = make(protocol)
    again.segments("test", 9)
    assert [[b.sha256() for b in again.segments(split, 5)] for split in SPLITS] == first
    list(again.batches(again.segments("train", 5), 7, generator(0)))
    assert (repr(np.random.get_state()), torch.get_rng_state().tolist()) == before  # noqa: NPY002


def test_clean_data_of_version_1_stay_as_they_are():
    hashes = [batch.sha256() for split in SPLITS for batch in make().segments(split, 0)]
    assert [entry["inputs"][:8] + entry["labels"][:8] for entry in hashes] == [
        "a93b560886def446",
        "7fe72b99466300fe",
        "554945a1b1448304",
        "d7880bfde3a23d18",
        "bc70fc488f76f889",
        "ce5b2b93d192359e",
        "5e1f295c716d2ba7",
        "a0fef020316b12e8",
        "305bc69d9e183190",
    ]  # other bytes are another version: bump MQAR.version with this list


# -- batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("order", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_an_epoch_has_every_example_once_and_no_batch_is_too_large(protocol, order, batch_size):
    task = make(protocol)
    segments = task.segments("train", 0)
    batches = list(task.batches(segments, batch_size, None if order is None else generator(order)))
    assert sorted(x for b in batches for x in examples(b)) == sorted(x for s in segments for x in examples(s))
    assert all(0 < len(b) <= batch_size for b in batches)
    assert sum(len(b) < batch_size for b in batches) <= len(segments)


def test_clean_batches_mix_segments_of_one_length_and_lengths_in_random_order():
    task = make()
    batches = list(task.batches(task.segments("train", 0), 4, generator(3)))
    short = [b for b in batches if b.inputs.shape[1] == 12]
    assert sum(len(b.slices["pairs"].unique()) == 2 for b in short) > len(short) // 2
    assert len(short) == 10  # 23 + 17 examples in batches of 4
    lengths = [b.inputs.shape[1] for b in batches]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    fewer = next(b for b in short if (b.slices["pairs"] == 2).any() and (b.slices["pairs"] == 3).any())
    padded = fewer.targets[fewer.slices["pairs"] == 2]
    assert fewer.targets.shape[1] == 3 and (padded[:, 2] == IGNORE).all() and (padded[:, :2] != IGNORE).all()


def test_order_of_batches_depends_on_the_generator_alone():
    task = make()
    segments = task.segments("train", 0)

    def stream(seed):
        return [batch.inputs.tolist() for batch in task.batches(segments, 7, generator(seed))]

    first = stream(1)
    torch.rand(5)
    assert stream(1) == first
    assert stream(2) != first


@pytest.mark.parametrize(("protocol", "seed"), [("based_mix", 3), ("based_mix", None), ("clean", None)])
def test_unshuffled_batches_are_contiguous_slices_of_one_segment(protocol, seed):
    task = make(protocol)
    segments = task.segments("train", 0)
    batches = list(task.batches(segments, 7, None if seed is None else generator(seed)))
    expected = [segment.inputs[i : i + 7].tolist() for segment in segments for i in range(0, len(segment), 7)]
    assert [batch.inputs.tolist() for batch in batches] == expected


def test_iclr24_is_shuffled():
    task = make("zoology_iclr24")
    (segment,) = task.segments("train", 0)
    (batch,) = task.batches([segment], 1000, generator(0))
    assert examples(batch) == examples(segment) and batch.inputs.tolist() != segment.inputs.tolist()


# -- scoring ----------------------------------------------------------------------------------------


def slow_score(predictions, batch):
    """Example by example and query by query: {(key, value): (accuracy, count)}."""
    found = {}
    for i in range(len(batch)):
        hits = []
        for j in range(batch.targets.shape[1]):
            if batch.targets[i, j] == IGNORE:
                continue
            hits.append(float(predictions[i, j] == batch.targets[i, j]))
            for name in ("distance", "order"):
                number = int(batch.slices[name][i, j])
                low = 2 ** (number.bit_length() - 1) if number else 0
                high = 2 * low - 1 if number else 0
                found.setdefault((name, f"{low}-{high}" if high > low else str(low)), []).append(hits[-1])
        length, pairs = int(batch.slices["length"][i]), int(batch.slices["pairs"][i])
        for key in (("all", ""), ("segment", f"{length}x{pairs}"), ("length", str(length)), ("pairs", str(pairs))):
            found.setdefault(key, []).append(sum(hits) / len(hits))
    return {key: (sum(values) / len(values), len(values)) for key, values in found.items()}


def test_score_equals_a_slow_loop():
    task = make(train=settings((44, 2, 23), (44, 11, 13)), test=settings((20, 5, 19)))
    (batch,) = task.batches(task.segments("train", 0), 1000, generator(0))  # two segments, with padding
    for scored in (batch, *task.segments("test", 0)):
        right = torch.rand(scored.targets.shape, generator=generator(1)) < 0.6
        predictions = torch.where(right, scored.targets.long(), 1)
        predictions[scored.targets == IGNORE] = IGNORE  # padding must not count as a hit
        scores = task.score(predictions, scored)
        assert {s.metric for s in scores} == {"accuracy"}
        expected = slow_score(predictions, scored)
        assert len(scores) == len(expected)
        for score in scores:
            value, count = expected[score.slice]
            assert score.count == count and score.value == pytest.approx(value, abs=1e-12)


def test_perfect_and_wrong_predictions_score_one_and_zero():
    task = make()
    segment = task.segments("test", 0)[0]
    assert all(score.value == 1 for score in task.score(segment.targets.long(), segment))
    assert all(score.value == 0 for score in task.score(torch.zeros_like(segment.targets), segment))
    assert task.score(segment.targets, segment)[0] == Score(metric="accuracy", value=1.0, count=23)


def test_score_refuses_predictions_of_another_shape():
    task = make()
    with pytest.raises(
        ValueError, match=r"^predictions must be \[N, P\] = \[23, 2\] like the targets, got \[23, 12\]$"
    ):
        task.score(torch.zeros(23, 12), task.segments("test", 0)[0])


# -- settings ---------------------------------------------------------------------------------------

SHAPE = "{length: 64, num_pairs: 4, num_examples: 1000}"
KEYS = "All of them: length, num_pairs, num_examples"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"protocol": "cleen"},
            'unknown protocol "cleen"; nearest: clean. All of them: clean, zoology_iclr24, based_mix',
        ),
        ({"vocab_size": 2}, "vocab_size must be a whole number of at least 4, got 2; nearest: 4"),
        ({"vocab_size": "64"}, "vocab_size must be a whole number of at least 4, got '64'; nearest: 4"),
        ({"vocab_size": 64.0}, "vocab_size must be a whole number of at least 4, got 64.0; nearest: 64"),
        (
            {"vocab_size": 63},
            "vocab_size must be even (half keys, half values) and at most 16777216, got 63; nearest: 62, 64",
        ),
        (
            {"vocab_size": 2**25},
            "vocab_size must be even (half keys, half values) and at most 16777216, got 33554432; nearest: 16777216",
        ),
        ({"power_a": 0}, "power_a must be a number above 0 and at most 10, got 0; published: 0.01"),
        ({"power_a": float("nan")}, "power_a must be a number above 0 and at most 10, got nan; published: 0.01"),
        ({"power_a": "1"}, "power_a must be a number above 0 and at most 10, got '1'; published: 0.01"),
        ({"train": []}, f"train must be a list of one or more segments such as [{SHAPE}], got []"),
        ({"valid": None}, f"valid must be a list of one or more segments such as [{SHAPE}], got None"),
        ({"test": [3]}, f"test[0] must be a segment such as {SHAPE}, got 3"),
        (
            {"train": [{"length": 12, "pairs": 3, "num_examples": 5}]},
            f'train[0] has an unknown key "pairs"; nearest: num_pairs. {KEYS}',
        ),
        ({"train": [{"length": 12, "num_pairs": 3}]}, f"train[0] lacks num_examples; write for example {SHAPE}"),
        ({"valid": settings((13, 3, 5))}, "valid[0].length must be even, got 13; nearest: 12, 14"),
        ({"valid": settings((-8, 3, 5))}, "valid[0].length must be a whole number of at least 4, got -8; nearest: 4"),
        ({"test": settings((12, 0, 5))}, "test[0].num_pairs must be a whole number of at least 1, got 0; nearest: 1"),
        (
            {"test": settings((12, 3, True))},
            "test[0].num_examples must be a whole number of at least 1, got True; nearest: 1",
        ),
        (
            {"test": settings((12, 3, 5), (14, 4, 5))},
            "test[1].length must be at least 4 * num_pairs, got length=14 and num_pairs=4; "
            "nearest: length=16 or num_pairs=3",
        ),
        (
            {"vocab_size": 10},
            "train[2].num_pairs must be at most the 4 keys of vocab_size=10, got 5; "
            "nearest: num_pairs=4 or vocab_size=12",
        ),
        (
            {"protocol": "based_mix", "vocab_size": 20},
            "train[2].length must be below vocab_size in a published protocol, got length=20 and vocab_size=20; "
            "nearest: length=18 or vocab_size=22",
        ),
        (
            {"protocol": "zoology_iclr24", "test": settings(*CELLS)},
            "protocol zoology_iclr24 has one test segment, got 3; "
            "keep one, or type protocol=based_mix or protocol=clean",
        ),
    ],
)
def test_impossible_settings_are_refused_with_a_way_out(changes, message):
    with pytest.raises(ValueError) as error:
        make(**changes)
    assert str(error.value) == message


def test_unknown_splits_and_batch_sizes_are_refused():
    task = make()
    with pytest.raises(ValueError, match=r'^unknown split "dev"; there are: train, valid, test$'):
        task.segments("dev", 0)
    with pytest.raises(ValueError, match=r"^batch_size must be a whole number of at least 1, got 0; nearest: 1$"):
        list(task.batches(task.segments("test", 0), 0, None))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_presets_have_the_constructors_keywords_and_make_the_task(path):
    text = path.read_text()
    config = OmegaConf.to_container(OmegaConf.create({"task": OmegaConf.create(text)}), resolve=True)["task"]
    assert text.startswith("# ")
    assert config.pop("_target_") == "tasks.mqar.MQAR"
    assert list(config) and set(config) == set(inspect.signature(MQAR).parameters)
    task = MQAR(**config)
    assert path.stem in ("mqar", "mqar_large", f"mqar_{task.protocol}")


def test_there_are_four_presets():
    assert len(YAMLS) == 4
