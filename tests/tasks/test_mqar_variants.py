"""Compositional, forgetting, continuous and twice-read MQAR: published hashes, laws by a naive reader, floors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from tasks import _mqar_bindings
from tasks._mqar_data import published_seeds
from tasks.base import IGNORE, sha256
from tasks.mqar import MQAR
from tasks.mqar_forgetting import first_values

CONF = Path(__file__).resolve().parents[2] / "conf" / "task"
ROWS = "mqar_compositional", "mqar_forgetting", "mqar_continuous", "mqar_read_twice"


def task(row, **changes):
    return instantiate({**yaml.safe_load((CONF / f"{row}.yaml").read_text()), **changes}, _convert_="all")


def few(row, **changes):
    config = yaml.safe_load((CONF / f"{row}.yaml").read_text())
    fewer = {split: [{**s, "num_examples": 60} for s in config[split]] for split in ("train", "valid", "test")}
    return task(row, **{**fewer, **changes})


def digest(array):
    return sha256(torch.from_numpy(np.ascontiguousarray(array)))[:16]


def test_the_published_generators_have_the_published_hashes():
    law = dict(vocab_size=8192, power_a=0.01, length=64)
    rows = _mqar_bindings.compositional(0, 500, **law, num_pairs=4)
    assert (digest(rows["inputs"]), digest(rows["labels"])) == ("46223520fc45ec0c", "40d42d5ec3cc080d")
    rows = _mqar_bindings.forgetting(0, 500, **law, num_pairs=8, num_updates=4)
    assert (digest(rows["inputs"]), digest(rows["labels"])) == ("a1a21da6f52ab806", "2003bd75d3d7ce68")


def test_seeds_are_those_of_the_published_framework():
    seeds = published_seeds({"train": 5, "valid": 1, "test": 7})
    assert seeds["train"][0] == 843828734 and seeds["train"][-1] == 974319580
    assert seeds["test"][0] == 2967327842 and seeds["test"][-1] == 3350193721


def test_the_published_protocol_takes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_BENCHMARK_DATA", str(tmp_path))
    small = [{"length": 24, "num_pairs": 2, "num_updates": 1, "num_examples": 5}]
    own = task("mqar_forgetting_zoology", vocab_size=40, train=small, valid=small, test=small)
    expected = _mqar_bindings.forgetting(
        843828734, 5, vocab_size=40, power_a=0.01, length=24, num_pairs=2, num_updates=1
    )
    found = own.segments("train", 3)[0]
    assert (found.inputs.numpy() == expected["inputs"]).all() and not own.seeded
    assert (found.labels().numpy() == expected["labels"]).all()


@pytest.mark.parametrize(("row", "size"), [("mqar_compositional", 2), ("mqar_forgetting", 1)])
def test_every_answer_is_the_last_binding_of_the_key(row, size):
    built = few(row)
    for segment in built.segments("test", 0):
        pairs = int(segment.slices["pairs"][0])
        width = size + 1
        updates = int(segment.slices["class"][0].sum()) if size == 1 else 0
        for n in range(len(segment)):
            tokens, labels = segment.inputs[n].tolist(), segment.labels()[n].tolist()
            asked = [i for i, label in enumerate(labels) if label != IGNORE]
            end = width * (pairs + updates)
            bound = {tuple(tokens[i : i + size]): tokens[i + size] for i in range(0, end, width)}  # the last one stays
            assert len(bound) == pairs and min(asked) >= end
            assert {tuple(tokens[i - size + 1 : i + 1]) for i in asked} == set(bound), "each key once"
            assert all(bound[tuple(tokens[i - size + 1 : i + 1])] == labels[i] for i in asked)
            keys = {token for key in bound for token in key}
            queried = {i - part for i in asked for part in range(size)}
            assert not keys & {tokens[i] for i in range(end, len(tokens)) if i not in queried}, "filler is no key"


def test_parts_of_compositional_keys_are_shared():
    segment = few("mqar_compositional").segments("train", 0)[0]
    keys = segment.inputs[:, :12].reshape(-1, 4, 3)
    for row in keys.tolist():
        assert len({key[0] for key in row}) == len({key[1] for key in row}) == 2
        assert len({tuple(key[:2]) for key in row}) == len({key[2] for key in row}) == 4


def test_an_update_always_changes_the_value_in_clean_and_not_always_as_published():
    def unchanged(inputs, pairs, updates):
        old = {}
        for n, row in enumerate(inputs.tolist()):
            for i in range(0, 2 * pairs, 2):
                old[n, row[i]] = row[i + 1]
        again = [
            (n, row[i], row[i + 1])
            for n, row in enumerate(inputs.tolist())
            for i in range(2 * pairs, 2 * (pairs + updates), 2)
        ]
        return sum(old[n, key] == value for n, key, value in again)

    setting = [{"length": 32, "num_pairs": 4, "num_updates": 3, "num_examples": 2000}]
    clean = task("mqar_forgetting", vocab_size=12, train=setting, valid=setting, test=setting).segments("train", 0)[0]
    assert unchanged(clean.inputs, 4, 3) == 0
    law = dict(vocab_size=12, power_a=0.01, length=32, num_pairs=4, num_updates=3)
    assert unchanged(_mqar_bindings.forgetting(1, 2000, **law)["inputs"], 4, 3) > 100


def test_the_first_value_is_right_for_keys_that_were_kept():
    built = few("mqar_forgetting")
    segment = built.segments("test", 0)[0]
    scores = {s.slice: s.value for s in built.score(first_values(segment), segment)}
    assert scores["class", "kept"] == 1 and scores["class", "updated"] == 0
    assert scores["all", ""] == pytest.approx(0.5)


def test_continuous_answers_are_the_value_beside_the_key():
    setting = [{"num_pairs": 3, "num_examples": 50}]
    built = task("mqar_continuous", vocab_size=14, dim=5, passes=2, train=setting, valid=setting, test=setting)
    table = built._seeded({}, 0)["table"]
    np.testing.assert_allclose(np.linalg.norm(table, axis=-1), 1, rtol=1e-6)
    segment = built.segments("test", 0)[0]
    assert segment.inputs.shape == (50, 9, 10) and segment.inputs.dtype == torch.float32
    assert (segment.inputs[:, 6:, 5:] == 0).all()
    for n in range(50):
        steps = segment.inputs[n]
        for i, target in zip(segment.positions[n].tolist(), segment.targets[n].tolist(), strict=True):
            shown = [j for j in range(6) if torch.equal(steps[j, :5], steps[i, :5])]
            assert len(shown) == 2, "one in each pass"
            assert all(np.allclose(steps[j, 5:], table[1, target]) for j in shown)
            assert segment.slices["distance"][n][i - 6] == i - shown[-1]
    assert sha256(segment.inputs) != sha256(built.segments("test", 1)[0].inputs)


def test_reading_twice_repeats_the_input_and_asks_in_the_second_reading():
    built = few("mqar_read_twice")
    once = MQAR.segments(built, "test", 0)
    for twice, single in zip(built.segments("test", 0), once, strict=True):
        length = single.inputs.shape[1]
        assert torch.equal(twice.inputs[:, :length], single.inputs) and torch.equal(
            twice.inputs[:, length:], single.inputs
        )
        assert torch.equal(twice.labels()[:, length:], single.labels()) and (twice.labels()[:, :length] == IGNORE).all()
    assert built.spec.length == 256 and built.id == "mqar_read_twice/clean,repeats=2"
    floors = built.solvers({"test": built.segments("test", 0)})
    assert set(floors) == {"most_frequent_answer", "latest_answer"} and max(floors.values()) < 0.25


def test_distances_count_from_the_binding_to_the_question():
    segment = few("mqar_forgetting").segments("test", 0)[0]
    for n in range(20):
        for column in range(segment.positions.shape[1]):
            at = int(segment.positions[n, column])
            origin = at - int(segment.slices["distance"][n, column])
            assert segment.inputs[n, origin] == segment.inputs[n, at]
            assert segment.inputs[n, origin + 1] == segment.targets[n, column]


@pytest.mark.parametrize("row", ROWS)
def test_splits_differ_and_equal_arguments_give_equal_bytes(row):
    built = few(row)
    seen = set()
    for split in ("train", "valid", "test"):
        segments = built.segments(split, 0)
        assert [s.sha256() for s in segments] == [s.sha256() for s in few(row).segments(split, 0)]
        own = {tuple(example.flatten().tolist()) for segment in segments for example in segment.inputs}
        assert not own & seen
        seen |= own


def test_data_are_pinned():
    found = {row: few(row).segments("test", 0)[0].sha256()["inputs"][:8] for row in ROWS}
    assert found == {
        "mqar_compositional": "0575c939",
        "mqar_forgetting": "2e7ac5bb",
        "mqar_continuous": "cec63091",
        "mqar_read_twice": "6090d17d",
    }, "other data: bump the version"


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (
            "mqar_compositional",
            {"train": [{"length": 48, "num_pairs": 5, "num_examples": 1}]},
            "length must be at least 30|must be a square, got 5; nearest: 4",
        ),
        (
            "mqar_compositional",
            {"train": [{"length": 20, "num_pairs": 4, "num_examples": 1}]},
            "must be at least 24 for 4 pairs, got 20",
        ),
        ("mqar_forgetting", {"protocol": "zoolgy"}, 'unknown protocol "zoolgy"; nearest: zoology'),
        (
            "mqar_forgetting",
            {"train": [{"length": 64, "num_pairs": 2, "num_updates": 3, "num_examples": 1}]},
            "num_updates must be at most num_pairs=2",
        ),
        ("mqar_forgetting", {"train": [{"length": 64, "num_examples": 1}]}, r"train\[0\] must have the keys of"),
        ("mqar_continuous", {"vocab_size": 8}, r"train\[1\].num_pairs must be at most vocab_size / 2 = 4, got 8"),
        ("mqar_read_twice", {"repeats": 0}, "repeats must be a whole number of at least 1"),
    ],
)
def test_a_setting_without_data_is_one_line(row, changes, message):
    with pytest.raises(Exception, match=message):
        task(row, **changes)


def test_more_pairs_than_values_are_refused_with_the_vocabulary_that_they_need():
    setting = [{"length": 160, "num_pairs": 25, "num_examples": 50}]
    with pytest.raises(
        InstantiationException, match=r"num_pairs must be at most 16, .* got 25; nearest: vocab_size=75"
    ):
        task("mqar_compositional", test=setting)
    assert task("mqar_compositional", vocab_size=75, test=setting).segments("test", 0)[0].inputs.shape == (50, 160)
