"""What classification tasks share: scores on hand-made predictions, macro F1 against scikit-learn's, floors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score

from tasks._classification import Classification, classification_spec, labelled
from tasks.base import Score, Tokens


class Coins(Classification):
    """The class is the first token; lengths from 1 to 11."""

    version, name, protocol = 1, "coins", "test"
    classes = ("heads", "tails", "edge")

    def __init__(self):
        self.spec = classification_spec(Tokens(vocab_size=3), self.classes, 11)

    def examples(self, split):
        rng = np.random.default_rng({"train": 0, "valid": 1, "test": 2}[split])
        labels = rng.choice(3, size=83, p=[0.5, 0.4, 0.1])
        inputs = np.zeros((83, 11), np.uint8)
        inputs[:, 0] = labels
        return labelled(inputs, labels, rng.integers(1, 12, size=83))

    def features(self, splits):
        return {
            "good": {split: np.eye(3)[part.inputs[:, 0].numpy()] for split, part in splits.items()},
            "bad": {split: np.zeros((len(part), 1)) for split, part in splits.items()},
        }


def pooled(task, parts):
    """Scores of several segments, pooled by count, with the derived ones."""
    entries = {}
    for predictions, segment in parts:
        for score in task.score(predictions, segment):
            entries.setdefault((score.metric, score.slice), []).append(score)
    whole = {
        key: Score(
            metric=key[0],
            slice=key[1],
            count=sum(s.count for s in scores),
            value=sum(s.value * s.count for s in scores) / sum(s.count for s in scores),
        )
        for key, scores in entries.items()
    }
    for score in task.derived(whole):
        whole[score.metric, score.slice] = score
    return whole


@pytest.fixture(scope="module")
def case():
    segment = Coins().segments("test", 0)[0]
    return torch.from_numpy(np.random.default_rng(5).integers(0, 2, size=(83, 1))), segment


@pytest.mark.parametrize("cut", [83, 30])
def test_macro_f1_and_the_confusion_matrix_are_scikit_learns_also_when_pooled(case, cut):
    predictions, segment = case
    rows = [slice(0, cut), slice(cut, 83)] if cut < 83 else [slice(0, 83)]
    scores = pooled(Coins(), [(predictions[part], segment.rows(part)) for part in rows])
    true, found = segment.targets[:, 0].numpy(), predictions[:, 0].numpy()
    assert scores["macro_f1", ("all", "")].value == pytest.approx(f1_score(true, found, average="macro"))
    assert scores["macro_f1", ("all", "")].count == 83
    table = confusion_matrix(true, found, labels=range(3), normalize="true")
    for i, a in enumerate(Coins.classes):
        for j, b in enumerate(Coins.classes):
            score = scores["share", ("confusion", f"{a}>{b}")]
            assert score.value == pytest.approx(table[i, j]) and score.count == (true == i).sum()


def test_accuracy_is_counted_over_all_by_class_and_by_band_of_lengths(case):
    predictions, segment = case
    scores = pooled(Coins(), [case])
    right = (predictions == segment.targets)[:, 0].numpy()
    lengths, true = segment.slices["length"].numpy(), segment.targets[:, 0].numpy()
    assert scores["accuracy", ("all", "")].value == pytest.approx(right.mean())
    assert scores["accuracy", ("class", "tails")].value == pytest.approx(right[true == 1].mean())
    bands = {"1": (1, 1), "2": (2, 2), "4": (3, 4), "8": (5, 8), "11": (9, 11)}
    assert {value for _, (key, value) in scores if key == "length"} == set(bands)
    for name, (low, high) in bands.items():
        inside = (lengths >= low) & (lengths <= high)
        assert scores["accuracy", ("length", name)].value == pytest.approx(right[inside].mean())
        assert scores["accuracy", ("length", name)].count == inside.sum()


def test_a_class_that_neither_occurs_nor_is_predicted_does_not_count(case):
    _, segment = case
    heads = segment.rows(segment.targets[:, 0] == 0)
    scores = pooled(Coins(), [(torch.zeros(len(heads), 1, dtype=torch.int64), heads)])
    assert scores["macro_f1", ("all", "")].value == 1


def test_floors_are_the_commonest_class_of_train_and_linear_models():
    task = Coins()
    splits = {split: task.segments(split, 0) for split in ("train", "valid", "test")}
    heads = (splits["test"][0].targets == 0).double().mean().item()
    assert task.solvers(splits) == pytest.approx({"majority": heads, "good": 1.0, "bad": heads})


def test_masks_follow_from_lengths_and_shapes_are_checked():
    batch = labelled(np.zeros((3, 4), np.uint8), np.array([0, 1, 0]), np.array([4, 1, 2]), key="digit")
    assert batch.key_mask.sum(1).tolist() == [4, 1, 2] and batch.key_mask[1, 0]
    assert batch.slices["digit"].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"predictions must be \[83, 1\], got \[82, 1\]"):
        Coins().score(torch.zeros(82, 1), Coins().segments("test", 0)[0])
    with pytest.raises(ValueError, match='unknown split "dev"'):
        Coins().segments("dev", 0)
