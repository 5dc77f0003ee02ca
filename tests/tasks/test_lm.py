"""Language modeling: windows, scores, slices and floors, on a small text of the test's own."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tasks import _cache, _corpora
from tasks.base import IGNORE, Score
from tasks.lm import LanguageModeling
from tasks.sources import MissingData
from tests.tasks.packaged import fetched

YAMLS = sorted((Path(__file__).parents[2] / "conf" / "task").glob("lm_*.yaml"))
L = 7
PINNED = ["d673001186e1", "3d4b0defca0b", "82b5bc571746"]
KJV = {"train": "b0c06d2bd8b1", "valid": "a5b1adaa5b3a", "test": "e1f003b34487"}


def story(seed, words):
    return " ".join(
        ["the", "cat", "sat", "on", "a", "mat"][i] for i in np.random.default_rng(seed).integers(6, size=words)
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_cache.ROOT, str(tmp_path / "cache"))
    _corpora._read.cache_clear()
    home = tmp_path / "texts"
    home.mkdir()
    for seed, (split, words) in enumerate({"train": 500, "valid": 40, "test": 61}.items()):
        (home / f"{split}1.txt").write_text(story(seed, words))
        (home / f"{split}2.txt").write_text(story(seed + 10, words // 2) + " é")
    return str(home)


def make(folder, **given):
    settings = dict(corpus="text", path=folder, level="byte", length=L, eval_lengths=[3, 11], ngram=3, rare=60)
    return LanguageModeling(**settings | given)


def perfect(segment, nats=0.0):
    """Predictions that cost `nats` at every target and are right."""
    scored = (segment.targets != IGNORE).float()
    return torch.stack([scored * nats, scored], -1)


def by(scores, metric):
    return {score.slice: score for score in scores if score.metric == metric}


# -- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["byte", "char"])
def test_every_byte_of_valid_and_test_is_scored_once_at_every_length(folder, level):
    task = make(folder, level=level)
    for split, lengths in {"valid": [L], "test": [L, 3, 11]}.items():
        stream = task._streams.tokens[split]
        segments = task.segments(split, 0)
        assert [segment.inputs.shape[1] for segment in segments] == lengths
        for segment in segments:
            scored = segment.targets != IGNORE
            assert segment.targets[scored].tolist() == stream[1:].tolist()
            assert segment.inputs[scored].tolist() == stream[:-1].tolist()
            sizes = task.tokenizer.num_bytes[segment.targets[scored].long().numpy()]
            files = [(Path(folder) / f"{split}{i}.txt").read_bytes() for i in (1, 2)]
            assert sizes.sum() == sum(map(len, files))
            assert (segment.positions == torch.arange(segment.inputs.shape[1])).all()
            assert torch.equal(segment.labels(), segment.targets)


def test_training_windows_follow_the_text_and_differ_from_epoch_to_epoch(folder):
    task = make(folder)
    (train,) = task.segments("train", 0)
    stream = train.inputs.flatten()
    text = bytes(token if token < 256 else 0 for token in stream.tolist())

    def epoch(seed):
        return list(task.batches([train], 16, torch.Generator().manual_seed(seed)))

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].inputs, other[0].inputs)
    rows = torch.cat([batch.inputs for batch in first])
    targets = torch.cat([batch.targets for batch in first])
    assert torch.equal(rows[:, 1:], targets[:, :-1]) and rows.dtype == torch.int64
    starts = set()
    for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
        window = bytes(token if token < 256 else 0 for token in [*row, target[-1]])
        assert window in text
        starts.add(text.index(window))
    assert len(rows) == len(train) - 1 and len(rows) * L >= 0.99 * len(stream) - 2 * L
    assert train.inputs.data_ptr() + train.inputs.element_size() == train.targets.data_ptr(), "they share their memory"


def test_windows_do_not_overlap_within_an_epoch(folder):
    task = make(folder)
    train = task.segments("train", 0)
    numbered = torch.arange(train[0].inputs.numel(), dtype=torch.int32).view(train[0].inputs.shape)
    batches = task.batches(
        [type(train[0])(inputs=numbered, positions=numbered, targets=numbered)], 5, torch.Generator()
    )
    seen = torch.cat([batch.inputs.flatten() for batch in batches])
    assert len(seen.unique()) == len(seen)


def test_data_are_pinned_and_the_same_for_every_seed(folder):
    task = make(folder)
    assert not task.seeded and task.id == "lm/text-byte"
    hashes = [task.segments(split, seed)[0].sha256() for seed in (0, 5) for split in ("train", "valid", "test")]
    assert hashes[:3] == hashes[3:]
    assert [each["inputs"][:12] for each in hashes[:3]] == PINNED, "other data: bump LanguageModeling.version"


def test_slices_of_test_are_those_of_the_definition(folder):
    task = make(folder)
    segment = task.segments("test", 0)[0]
    stream = task._streams.tokens["train"].tolist()
    hits = 0
    for tokens, targets, since, recall in zip(
        segment.inputs.tolist(),
        segment.targets.tolist(),
        segment.slices["since"].tolist(),
        segment.slices["recall"].tolist(),
        strict=True,
    ):
        row = [*tokens, targets[-1]]
        for t in range(1, L):
            gram = row[t - 1 : t + 2]
            before = [s for s in range(1, t) if row[s - 1 : s + 2] == gram and targets[t] != IGNORE]
            assert since[t] == (t - before[-1] if before else 0)
            rare = sum(stream[i : i + 3] == gram for i in range(len(stream) - 2)) <= 60
            assert recall[t] == bool(before and rare)
            hits += recall[t]
    assert hits


# -- scores ---------------------------------------------------------------------------------------


def test_bits_per_byte_are_nats_over_bytes(folder):
    for level in ("byte", "char"):
        task = make(folder, level=level)
        segment = task.segments("test", 0)[0]
        scores = task.score(perfect(segment, nats=0.5), segment)
        size = sum(len((Path(folder) / f"test{i}.txt").read_bytes()) for i in (1, 2))
        tokens = int((segment.targets != IGNORE).sum())
        bits = by(scores, "bits_per_byte")["all", ""]
        assert task.spec.metrics["bits_per_byte"].unit == "bits per byte", "its name in words, so pages say it once"
        assert bits.value == pytest.approx(0.5 * tokens / math.log(2) / size) and bits.count == size
        loss = by(scores, "loss")["all", ""]
        assert loss.value == pytest.approx(0.5) and loss.count == tokens
        assert by(scores, "accuracy")["all", ""].value == 1


def test_slices_tell_where_the_nats_are(folder):
    task = make(folder)
    segment = task.segments("test", 0)[0]
    predictions = perfect(segment)
    predictions[:, 0, 0] = 2.0  # the first target of every window
    predictions[..., 0] += segment.slices["recall"].float()
    loss = {where: score.value for where, score in by(task.score(predictions, segment), "loss").items()}
    assert loss["position", "0"] == 2 and loss["recall", "hit"] == 1
    hits, scored = segment.slices["recall"].bool(), segment.targets != IGNORE
    assert loss["recall", "other"] == pytest.approx(2 * len(segment) / int((~hits & scored).sum()))
    assert [value for key, value in loss if key == "position"] == ["0", "1", "2-3", "4-7"]
    counts = [
        score.count for where, score in by(task.score(predictions, segment), "loss").items() if where[0] == "since"
    ]
    assert sum(counts) == int((segment.slices["since"] > 0).sum())


def test_other_lengths_count_for_their_length_only(folder):
    task = make(folder)
    entries = {}
    for segment in task.segments("test", 0):
        nats = {L: 1.0, 3: 5.0, 11: 3.0}[segment.inputs.shape[1]]
        found = task.score(perfect(segment, nats), segment)
        assert {score.slice[0] for score in found} == (
            {"length"} if nats > 1 else {"all", "length", "position", "since", "recall"}
        )
        entries |= {(score.metric, score.slice): score for score in found}
    entries["loss", ("all", "")] = Score(metric="loss", value=9.0, count=1)  # what pooling all segments gives
    derived = {(score.metric, score.slice): score.value for score in task.derived(entries)}
    assert derived["loss", ("all", "")] == pytest.approx(1)
    assert derived["perplexity", ("all", "")] == pytest.approx(math.e)
    assert derived["perplexity", ("length", "3")] == pytest.approx(math.exp(5))


def test_predictions_are_the_nats_and_hits_of_the_targets(folder):
    task = make(folder)
    batch = task.segments("test", 0)[0].rows(slice(-3, None))
    torch.manual_seed(0)
    logits = torch.randn(*batch.targets.shape, task.spec.output.num_classes)
    kept = task.predict(logits, batch)
    for row, column in [(0, 0), (1, 4), (2, 1)]:
        target = int(batch.targets[row, column])
        if target != IGNORE:
            assert kept[row, column, 0] == pytest.approx(-float(logits[row, column].log_softmax(-1)[target]), rel=1e-5)
            assert kept[row, column, 1] == float(logits[row, column].argmax() == target)
    scored = batch.targets != IGNORE
    assert not kept[~scored].any() and (~scored).any()
    assert float(task.loss(logits, batch)) == pytest.approx(float(kept[..., 0][scored].mean()), rel=1e-5)
    uniform = task.score(task.predict(torch.zeros_like(logits), batch), batch)
    assert by(uniform, "loss")["length", str(L)].value == pytest.approx(math.log(257), rel=1e-5)
    assert task.spec.chance == pytest.approx(8.0056, rel=0.05)


def test_floors_order_as_their_contexts_and_a_period_costs_nothing(folder, tmp_path):
    task = make(folder)
    splits = {split: task.segments(split, 0) for split in ("train", "valid", "test")}
    floors = task.solvers(splits)
    assert floors["trigram"] < floors["bigram"] < floors["unigram"] < task.spec.chance
    (tmp_path / "period.txt").write_text("abcd" * 2000)
    task = make(str(tmp_path / "period.txt"))
    floors = task.solvers({split: task.segments(split, 0) for split in ("train", "valid", "test")})
    assert floors["unigram"] == pytest.approx(2, abs=0.05) and floors["bigram"] < 0.1 and floors["xz"] < 2


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(length=1), "length must be at least 2"),
        (dict(length=5000), "needs two windows"),
        (dict(ngram=1), "ngram must be at least 2"),
        (dict(rare=-1), "rare at least 0"),
        (dict(eval_lengths=[0]), "eval_lengths must be 1 or more"),
        (dict(corpus="kjw"), 'unknown corpus "kjw"; nearest: kjv'),
    ],
)
def test_settings_that_cannot_be_are_one_line(folder, given, said):
    with pytest.raises(ValueError, match=said):
        make(folder, **given)


def test_an_unknown_split_is_one_line(folder):
    with pytest.raises(ValueError, match='unknown split "dev"; there are: train, valid, test'):
        make(folder).segments("dev", 0)


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)
def test_presets_write_out_every_keyword_and_read_text_of_yours(folder, yaml):
    config = OmegaConf.to_container(OmegaConf.load(yaml))
    assert config.pop("_target_") == "tasks.lm.LanguageModeling"
    assert config.keys() == {
        "corpus",
        "path",
        "level",
        "vocab_size",
        "length",
        "eval_lengths",
        "ngram",
        "rare",
        "limits",
    }
    if config["corpus"] in ("text", "enwik8"):
        with pytest.raises(MissingData, match=r"type task\.path=FILE"):
            LanguageModeling(**config)
    small = {"vocab_size": 300} if config["level"] == "bpe" else {}
    task = LanguageModeling(**config | {"corpus": "text", "path": folder, "length": 8, "eval_lengths": [16]} | small)
    assert task.spec.length == 16 and task.segments("test", 0)


def test_the_bible_is_pinned():
    fetched("kjv")
    config = OmegaConf.to_container(OmegaConf.load(next(path for path in YAMLS if path.stem == "lm_kjv_char")))
    config.pop("_target_")
    task = LanguageModeling(**config)
    assert task.spec.inputs.vocab_size == 83 and task.spec.length == 512
    hashes = {split: task.segments(split, 0)[0].sha256()["inputs"][:12] for split in ("train", "valid", "test")}
    assert hashes == KJV, "other data: bump LanguageModeling.version"
