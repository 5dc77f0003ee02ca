"""Digits: the packaged images, their splits and their scores."""

from __future__ import annotations

import hashlib

import pytest
import torch
from sklearn.datasets import load_digits

from tasks.digits import Digits


@pytest.fixture(scope="module")
def splits():
    return {split: Digits().segments(split, 0)[0] for split in ("train", "valid", "test")}


def test_splits_hold_every_image_once_with_its_own_label(splits):
    source = load_digits()
    known = {image.astype(int).tobytes(): label for image, label in zip(source.data, source.target, strict=True)}
    assert len(known) == 1797, "an image that occurs twice could stand on both sides of a cut"
    found = {
        image.long().numpy().tobytes(): int(label)
        for segment in splits.values()
        for image, label in zip(segment.inputs, segment.targets[:, 0], strict=True)
    }
    assert found == known
    assert [len(segment) for segment in splits.values()] == [1258, 180, 359]


def test_pixels_are_read_row_by_row_on_the_grid_of_the_spec(splits):
    task = Digits()
    image = splits["train"].inputs[0].long().view(task.spec.grid).numpy()
    assert (load_digits().images == image).all((1, 2)).sum() == 1
    assert task.spec.length == 64 and int(splits["train"].inputs.max()) == task.spec.inputs.vocab_size - 1


def test_every_digit_is_in_every_split_and_the_data_are_pinned(splits):
    for segment in splits.values():
        assert len(segment.targets.unique()) == 10
    digest = hashlib.sha256("".join(segment.sha256()["inputs"] for segment in splits.values()).encode())
    assert digest.hexdigest().startswith("5899bd4d1e4caed1"), "other images or another cut: bump Digits.version"


def test_seeds_do_not_change_a_data_set():
    assert not Digits().seeded
    assert torch.equal(Digits().segments("test", 0)[0].inputs, Digits().segments("test", 7)[0].inputs)


def test_accuracy_is_counted_over_all_and_by_digit(splits):
    segment = splits["test"]
    predictions = segment.targets.long().clone()
    predictions[predictions == 3] = 8  # every three is read as an eight
    scores = {score.slice: score for score in Digits().score(predictions, segment)}
    threes = int((segment.targets == 3).sum())
    assert scores["digit", "3"].value == 0 and scores["digit", "3"].count == threes
    assert scores["digit", "8"].value == 1
    assert scores["all", ""].value == pytest.approx(1 - threes / 359)
    assert scores["confusion", "3>8"].value == 1 and scores["confusion", "8>3"].value == 0


def test_a_linear_model_of_the_pixels_is_a_high_floor(splits):
    floors = Digits().solvers({split: [segment] for split, segment in splits.items()})
    common = int(splits["train"].targets[:, 0].long().bincount().argmax())
    assert floors["majority"] == (splits["test"].targets == common).double().mean()
    assert 0.95 < floors["linear, pixels"] < 1


def test_an_unknown_split_is_one_line():
    with pytest.raises(ValueError, match='unknown split "dev"; there are: train, valid, test'):
        Digits().segments("dev", 0)
