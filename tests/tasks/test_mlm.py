"""Masked language modeling: what is hidden and how, fixed masks and new ones, scores and floors."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tasks import _cache, _corpora
from tasks.mlm import MaskedLanguageModeling

YAMLS = sorted((Path(__file__).parents[2] / "conf" / "task").glob("mlm_*.yaml"))
L = 40
PINNED = "a2c47e1a1ac3"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_cache.ROOT, str(tmp_path / "cache"))
    _corpora._read.cache_clear()
    home = tmp_path / "texts"
    home.mkdir()
    draw = np.random.default_rng(0)
    for split, size in {"train": 30_000, "valid": 9_000, "test": 20_000}.items():
        (home / f"{split}.txt").write_bytes(draw.integers(97, 123, size=size, dtype=np.uint8).tobytes())
    return str(home)


def make(folder, **given):
    return MaskedLanguageModeling(**dict(corpus="text", path=folder, level="char", length=L) | given)


def test_windows_are_those_of_the_text_but_for_the_hidden_tokens(folder):
    task = make(folder)
    text = task._streams.tokens["test"].astype(int)
    (segment,) = task.segments("test", 0)
    windows = text[: len(segment) * L].reshape(-1, L)
    assert len(segment) == (len(text) - 1) // L and segment.targets.shape == (len(segment), round(0.15 * L))
    positions = segment.positions.long().numpy()
    assert (np.diff(positions) > 0).all(), "six different positions of every window"
    assert (np.take_along_axis(windows, positions, 1) == segment.targets.long().numpy()).all()
    rest = np.ones(windows.shape, bool)
    np.put_along_axis(rest, positions, False, 1)
    assert (segment.inputs.long().numpy() == windows)[rest].all()
    assert not (segment.inputs == task.mask).numpy()[rest].any()


def test_eighty_ten_ten_anywhere_in_the_window(folder):
    task = make(folder)
    (segment,) = task.segments("test", 0)
    shown = segment.inputs.gather(1, segment.positions.long())
    kind, count = segment.slices["class"], segment.targets.numel()
    assert torch.equal(shown == task.mask, kind == 0)
    assert torch.equal(shown[kind == 2], segment.targets[kind == 2])
    for i, share in enumerate((0.8, 0.1, 0.1)):
        assert float((kind == i).float().mean()) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))
    other = torch.bincount(shown[kind == 1].long(), minlength=task.mask + 1)
    assert other[: task.tokenizer.start].min() >= 0 and not other[task.tokenizer.start :].any()
    assert len(torch.unique(shown[kind == 1])) > 26  # of the whole vocabulary
    places = torch.bincount(segment.positions.flatten().long(), minlength=L).float()
    assert places.min() > 0.5 * places.mean() and places.max() < 1.6 * places.mean()


def test_masks_are_fixed_by_split_and_seed(folder):
    task = make(folder)
    hashes = {
        (split, seed): task.segments(split, seed)[0].sha256()["inputs"]
        for split in ("valid", "test")
        for seed in (0, 1)
    }
    assert len(set(hashes.values())) == 4 and task.seeded
    assert make(folder).segments("test", 1)[0].sha256()["inputs"] == hashes["test", 1]
    assert hashes["test", 0].startswith(PINNED), "other masks: bump MaskedLanguageModeling.version"


def test_training_masks_are_drawn_anew_by_the_generator_alone(folder):
    task = make(folder)
    train = task.segments("train", 0)

    def epoch(seed):
        return list(task.batches(train, 64, torch.Generator().manual_seed(seed)))

    first, again, other = epoch(3), epoch(3), epoch(4)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.positions, b.positions)
    assert not torch.equal(first[0].positions, other[0].positions)
    inputs = torch.cat([batch.inputs for batch in first])
    targets, positions = (torch.cat([getattr(batch, name) for batch in first]) for name in ("targets", "positions"))
    text = bytes(task._streams.tokens["train"].astype(np.uint8).tolist())
    whole = inputs.scatter(1, positions, targets).to(torch.uint8)
    assert all(bytes(row.tolist()) in text for row in whole[:50])
    assert len(inputs) in (len(train[0]), len(train[0]) - 1) and inputs.dtype == torch.int64
    assert float((inputs == task.mask).float().mean()) == pytest.approx(0.15 * 0.8, abs=0.01)


def test_scores_are_of_the_hidden_tokens_and_by_class(folder):
    task = make(folder)
    (segment,) = task.segments("valid", 0)
    kind = segment.slices["class"]
    predictions = torch.stack([kind.float(), (kind == 2).float()], -1)
    scores = {(score.metric, score.slice): score for score in task.score(predictions, segment)}
    assert scores["accuracy", ("class", "kept")].value == 1 and scores["accuracy", ("class", "masked")].value == 0
    assert scores["loss", ("class", "random")].value == 1
    bits = scores["bits_per_byte", ("all", "")]
    assert bits.count == segment.targets.numel()
    assert bits.value == pytest.approx(float(kind.double().mean()) / math.log(2))


def test_floors_of_noise_are_its_entropy_and_a_pattern_is_found_from_both_sides(folder, tmp_path):
    def floors(task):
        return task.solvers({split: task.segments(split, 0) for split in ("train", "valid", "test")})

    noise = floors(make(folder))
    assert noise["unigram"] == pytest.approx(math.log2(26), abs=0.05)
    assert noise["left and right"] > noise["unigram"] - 0.1
    (tmp_path / "pattern.txt").write_bytes(b"abcacb" * 20_000)  # a b c | c a b ...: one side is not enough
    pattern = floors(make(str(tmp_path / "pattern.txt")))
    assert pattern["left and right"] < pattern["left"] < pattern["unigram"]


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)
def test_presets_write_out_every_keyword(folder, yaml):
    config = OmegaConf.to_container(OmegaConf.load(yaml))
    assert config.pop("_target_") == "tasks.mlm.MaskedLanguageModeling"
    assert config.keys() == {"corpus", "path", "level", "vocab_size", "length", "limits"}
    task = MaskedLanguageModeling(
        **config | {"corpus": "text", "path": folder, "length": L, "vocab_size": config["vocab_size"] and 300}
    )
    assert not task.spec.causal and task.spec.inputs.vocab_size == task.mask + 1


def test_settings_that_cannot_be_are_one_line(folder):
    with pytest.raises(ValueError, match="needs two windows"):
        make(folder, length=8000)
    with pytest.raises(ValueError, match='unknown split "dev"'):
        make(folder).segments("dev", 0)
