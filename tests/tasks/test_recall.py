"""Four-pattern recall: one memory in four forms, each against a loop that answers it by reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.base import IGNORE
from tasks.mqar import MQAR
from tasks.recall import PATTERNS, Recall

SEGMENTS = [dict(length=24, num_pairs=3, num_examples=41), dict(length=32, num_pairs=5, num_examples=29)]


def make(pattern, segments=SEGMENTS, vocab_size=26):
    return Recall(pattern=pattern, vocab_size=vocab_size, train=segments, valid=segments, test=segments)


def asked(task, segment):
    """[(key, value)] of every example in the order of asking, read off the inputs and targets."""
    rows = []
    for i in range(len(segment)):
        inputs, places = segment.inputs[i].tolist(), segment.positions[i].tolist()
        if task.protocol == "noncausal_self":
            keys = [inputs[place - 1] for place in places]
            assert all(inputs[place] == task.mask for place in places)
        else:
            keys = [inputs[place] for place in places]
        rows.append(list(zip(keys, segment.targets[i].tolist(), strict=True)))
    return rows


def bindings(task, segment):
    """{key: value} of every example, read off the sequence or the context as a reader would."""
    memory = segment.inputs if segment.context is None else segment.context
    found = []
    for i, row in enumerate(memory.tolist()):
        taken = set()
        if task.protocol == "causal_self":
            taken = set(segment.positions[i].tolist())
        pairs = {}
        for t in range(0, len(row), 2):
            key, value = row[t], row[t + 1]
            if t not in taken and 0 < key < task.vocab_size // 2 and task.mask != value:
                pairs.setdefault(key, []).append(value)
        found.append(pairs)
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_question_has_its_answer_in_the_sequence_and_its_key_stands_once(pattern):
    task = make(pattern)
    for segment in task.segments("train", 0):
        for questions, pairs in zip(asked(task, segment), bindings(task, segment), strict=True):
            assert len({key for key, _ in questions}) == len(questions)
            for key, value in questions:
                assert pairs[key] == [value]


def test_all_patterns_ask_for_the_same_pairs():
    parts = {pattern: make(pattern).segments("test", 3) for pattern in PATTERNS}
    for index in range(len(SEGMENTS)):
        questions = {p: asked(make(p), segments[index]) for p, segments in parts.items()}
        for pattern in PATTERNS[1:]:
            ours = [sorted(row) for row in questions[pattern]]
            assert ours == [sorted(row) for row in questions["causal_self"]], pattern
        assert questions["causal_cross"] == questions["causal_self"] == questions["noncausal_cross"]


def test_causal_self_is_mqar_but_for_repeated_values():
    """The same law and layout; only the stream and the values' independence differ."""
    ours = make("causal_self").segments("train", 0)[0]
    mqar = MQAR(protocol="clean", vocab_size=26, train=SEGMENTS, valid=SEGMENTS, test=SEGMENTS).segments("train", 0)[0]
    for name in ("inputs", "positions", "targets"):
        assert getattr(ours, name).shape == getattr(mqar, name).shape
    assert ours.slices.keys() == mqar.slices.keys()
    many = make("causal_self", [dict(length=64, num_pairs=12, num_examples=200)]).segments("train", 0)[0]
    assert any(len(set(row)) < len(row) for row in many.targets.tolist())  # 12 of 13 values: some must repeat


def test_a_stream_of_answers_gives_each_answer_as_the_next_input():
    task = make("causal_cross")
    for segment in task.segments("train", 0):
        assert segment.positions.tolist() == [list(range(0, 2 * segment.targets.shape[1], 2))] * len(segment)
        assert torch.equal(segment.inputs[:, 1::2], segment.targets)
    assert task.spec.length == 10 and task.spec.context_length == 32 and task.spec.causal


def test_questions_stand_before_and_after_their_pairs_where_nothing_is_causal():
    """A reader of the past alone cannot answer: in about half of the cases the pair comes later."""
    task = make("noncausal_self", [dict(length=64, num_pairs=8, num_examples=300)])
    segment = task.segments("train", 0)[0]
    before = []
    for i, row in enumerate(segment.inputs.tolist()):
        for place in segment.positions[i].tolist():
            key = row[place - 1]
            pair = next(t for t in range(0, len(row), 2) if row[t] == key and t != place - 1)
            before.append(pair < place)
            assert abs(place - pair) == segment.slices["distance"][i][segment.positions[i].tolist().index(place)]
    assert 0.35 < np.mean(before) < 0.65


def test_contexts_hold_no_question_and_are_turned_by_whole_pairs():
    for pattern in ("noncausal_cross", "causal_cross"):
        task = make(pattern)
        segment = task.segments("train", 0)[1]
        starts = []
        for questions, row in zip(asked(task, segment), segment.context.tolist(), strict=True):
            for key, value in questions:
                (place,) = [t for t, token in enumerate(row) if token == key]
                assert place % 2 == 0 and row[place + 1] == value
                starts.append(place)
        assert len(set(starts)) > 10  # pairs stand anywhere


def test_an_answer_says_nothing_of_the_others():
    """Values are drawn with replacement: given the answers so far, the next is still uniform over all values."""
    task = make("causal_cross", [dict(length=16, num_pairs=4, num_examples=6000)], vocab_size=12)
    targets = task.segments("train", 0)[0].targets.long()
    repeats = (targets[:, 1:] == targets[:, :1]).double().mean().item()
    assert abs(repeats - 1 / 6) < 4 * (1 / 6 * 5 / 6 / 18000) ** 0.5  # four standard errors


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_mixes_lengths_under_masks_but_in_causal_self(pattern):
    task = make(pattern)
    segments = task.segments("train", 0)
    seen = 0
    for batch in task.batches(segments, 16, torch.Generator().manual_seed(5)):
        seen += len(batch)
        assert batch.targets.shape == batch.positions.shape
        if pattern == "causal_self":
            assert batch.key_mask is None and batch.inputs.shape[1] in (24, 32)
            continue
        stream, mask = (
            (batch.inputs, batch.key_mask) if pattern == "noncausal_self" else (batch.context, batch.context_mask)
        )
        assert mask.shape == stream.shape and torch.equal(stream == task.pad, ~mask)
        assert set(mask.sum(1).tolist()) <= {24, 32}
        labelled = (batch.targets != IGNORE).sum(1)
        assert torch.equal(labelled == 3, mask.sum(1) == 24)
    assert seen == 70
    whole = list(task.batches(segments, 16, None))
    assert sum(len(batch) for batch in whole) == 70 and all(batch.key_mask is None for batch in whole)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equal_seeds_give_equal_bytes_and_splits_differ(pattern):
    hashes = [make(pattern).segments(split, seed)[0].sha256() for split, seed in (("train", 0), ("train", 0))]
    assert hashes[0] == hashes[1]
    assert hashes[0] != make(pattern).segments("train", 1)[0].sha256()
    assert hashes[0] != make(pattern).segments("valid", 0)[0].sha256()
    assert ("context" in hashes[0]) == pattern.endswith("cross")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_perfect_answers_score_one_and_slices_add_up(pattern):
    task = make(pattern)
    segment = task.segments("test", 0)[1]
    scores = {(s.metric, s.slice): s for s in task.score(segment.targets.long(), segment)}
    assert scores["accuracy", ("all", "")].value == 1
    assert scores["accuracy", ("segment", "32x5")].count == 29
    assert any(key == "distance" for _, (key, _) in scores) == pattern.endswith("self")
    wrong = task.score(segment.targets.long() + 1, segment)
    assert all(score.value == 0 for score in wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pattern="causal_corss"), 'unknown pattern "causal_corss"; nearest: causal_cross'),
        (dict(vocab_size=27), "vocab_size must be even"),
        (dict(segments=[dict(length=10, num_pairs=3, num_examples=1)]), "length must be at least 4"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(changes, message):
    settings = dict(pattern="causal_self", vocab_size=26, segments=SEGMENTS) | changes
    with pytest.raises(ValueError, match=message) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match='unknown split "trian"; there are: train, valid, test'):
        make("causal_self").segments("trian", 0)
