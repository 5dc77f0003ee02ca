"""The page of tasks: every row is on it, what an entry says, and pictures of every kind of input."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bench import examples
from bench.cell import make_task
from bench.config import ROOT, options
from bench.list import comment
from bench.report.example_inputs import picture
from bench.report.example_strips import _asked, _marks
from tasks.base import Batch, Metric, PerSequence, PerToken, Task, TaskSpec, Tokens, Values, Vectors


def page() -> str:
    return (ROOT / "docs" / "tasks.md").read_text()


@pytest.mark.parametrize("name", options("task"))
def test_every_row_is_on_the_committed_page_with_its_comment(name):
    what = comment(options("task")[name])
    assert what.endswith("."), "a row begins with a comment of one sentence"
    listed = [line for line in page().splitlines() if line.startswith(f"| **{name}** |") and f" | {what} | " in line]
    assert f"### {name}\n\n{what}\n" in page() or listed, "type python -m bench.examples --to docs/tasks"


def test_every_row_has_a_section_of_its_own():
    assert {examples.section(path) for path in options("task").values()} == set(examples.SECTIONS) - {"More"}


def test_pictures_are_those_of_the_page_small_and_not_of_private_data():
    drawn = {path.stem: path for path in (ROOT / "docs" / "tasks").glob("*.png")}
    assert drawn and all(f"](tasks/{name}.png)" in page() for name in drawn)
    assert all(path.stat().st_size < 80_000 for path in drawn.values())
    assert not [name for name in drawn if examples.PRIVATE in examples.data(name)]


def test_the_entry_of_a_generated_task():
    text = examples.entry("induction", examples.made("induction"))
    assert text.startswith(f"### induction\n\n{comment(options('task')['induction'])}\n")
    assert "`induction/clean`, version 1: tokens of 16, up to 512 positions → a class of 16" in text
    assert "32,000 / 600 / 2,500 examples in train / valid / test" in text
    assert "accuracy: chance 0.067; floors: majority 0.06" in text
    assert "data: generated\n" in text
    assert (
        "`make bench TASK=induction`; suite `skills`, backbone `skill_decoder`; larger or published: induction_large\n"
        in text
    )


def test_how_a_row_is_run():
    assert examples.command("recall_noncausal_cross").startswith(
        "`make bench PATTERN=noncausal_cross`; suite `patterns`"
    )
    assert examples.command("listops") == "`make bench TASK=listops`; suite `lra`, backbone `lra_encoder`"
    assert examples.command("mlm_kjv_char") == "`make bench TASK=mlm_kjv_char`; suite `mlm`, backbone `lm_encoder`"


def test_where_data_come_from():
    assert "python -m bench.data fetch kjv" in examples.data("lm_kjv_char")
    assert "1.4 MB" in examples.data("mnist5k_14")
    assert examples.data("byte_text_lra", brief=True) == "`python -m bench.data fetch imdb`"
    assert examples.data("listops") == "generated"


def test_answers_of_recall_are_marked_where_they_stand():
    spec = spec_of(Tokens(vocab_size=64), PerToken(num_classes=64), causal=True)
    task = Drawn(spec)
    tokens = [3, 40, 7, 50, 9, 7, 11, 3]
    full, pale = _marks(task, tokens, [], [(5, 50), (7, 40)])
    assert set(full) == {5, 7}
    assert {i for i, colour in pale.items() if colour == full[5]} == {2, 3}
    assert {i for i, colour in pale.items() if colour == full[7]} == {0, 1}
    full, pale = _marks(task, [0, 5, 0, 6, 1, 0, 0, 0][:7], [], [(4, 5), (5, 6)])
    assert {i: pale[i] for i in (1, 3)} == {1: full[4], 3: full[5]}


class Drawn(Task):
    """A task that only has a spec."""

    version, name, protocol = 1, "drawn", "test"

    def __init__(self, spec: TaskSpec, words: str | None = None):
        self.spec, self.words = spec, words

    def spelled(self, tokens):
        return None if self.words is None else [self.words[token] for token in tokens.tolist()]

    def segments(self, split, seed):
        raise NotImplementedError

    def batches(self, segments, batch_size, generator):
        raise NotImplementedError

    def score(self, predictions, segment):
        raise NotImplementedError


def spec_of(inputs, output, **settings):
    metrics = {"accuracy": Metric(unit="fraction", higher_is_better=True)}
    settings = {"causal": False, **settings}
    return TaskSpec(inputs=inputs, output=output, length=9, metrics=metrics, primary="accuracy", chance=0.5, **settings)


def batch_of(inputs, targets, positions=None, **settings):
    targets = torch.as_tensor(targets)
    positions = torch.zeros(targets.shape[:2], dtype=torch.int64) if positions is None else torch.as_tensor(positions)
    return Batch(inputs=torch.as_tensor(inputs), positions=positions, targets=targets, **settings)


RNG = np.random.default_rng(0)
TOKENS = RNG.integers(5, size=(7, 9))
NUMBERS = RNG.standard_normal((7, 9, 2)).astype(np.float32)
CLASSES = RNG.integers(3, size=(7, 1))
LAST = np.full((7, 1), 8)
VALUES = RNG.standard_normal((7, 3, 2)).astype(np.float32)
WHOLE, EACH = PerSequence(num_classes=3), PerToken(num_classes=5)
TEXT = "ab c\f"
KINDS = {
    "strip with a class": (spec_of(Tokens(vocab_size=5), WHOLE), None, batch_of(TOKENS, CLASSES)),
    "strip with answers": (spec_of(Tokens(vocab_size=5), EACH), None, batch_of(TOKENS, CLASSES, LAST)),
    "strip over a context": (
        spec_of(Tokens(vocab_size=5), EACH, context=Tokens(vocab_size=5), context_length=9),
        None,
        batch_of(TOKENS, CLASSES, LAST, context=torch.as_tensor(TOKENS)),
    ),
    "text": (spec_of(Tokens(vocab_size=5), WHOLE), TEXT, batch_of(TOKENS, CLASSES)),
    "pair of texts": (
        spec_of(Tokens(vocab_size=5), WHOLE, context=Tokens(vocab_size=5), context_length=9),
        TEXT,
        batch_of(TOKENS, CLASSES, context=torch.as_tensor(TOKENS)),
    ),
    "text with hidden tokens": (spec_of(Tokens(vocab_size=5), EACH), TEXT, batch_of(TOKENS, CLASSES, LAST)),
    "image of tokens": (spec_of(Tokens(vocab_size=5), WHOLE, grid=(3, 3)), None, batch_of(TOKENS, CLASSES)),
    "image of patches": (
        spec_of(Vectors(dim=4), WHOLE, grid=(3, 3)),
        None,
        batch_of(RNG.standard_normal((7, 9, 4)).astype(np.float32), CLASSES),
    ),
    "series": (
        spec_of(Vectors(dim=2), WHOLE),
        None,
        batch_of(NUMBERS, CLASSES, key_mask=torch.arange(9).expand(7, 9) < 6),
    ),
    "vectors with answers": (spec_of(Vectors(dim=2), EACH), None, batch_of(NUMBERS, CLASSES, LAST)),
    "forecast from a context": (
        spec_of(Vectors(dim=2), Values(num_values=2), context=Vectors(dim=2), context_length=9),
        None,
        batch_of(NUMBERS, VALUES, context=torch.as_tensor(NUMBERS)),
    ),
    "forecast in one stream": (
        spec_of(Vectors(dim=2), Values(num_values=2)),
        None,
        batch_of(NUMBERS, VALUES, np.tile([6, 7, 8], (7, 1))),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_every_kind_and_always_the_same(kind):
    spec, words, segment = KINDS[kind]
    task = Drawn(spec, words)
    png = picture("drawn", task, [segment])
    image = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert image.shape[1] > 300 and (image < 250).mean() > 0.002
    assert png == picture("drawn", task, [segment])
    if not isinstance(spec.output, Values):
        assert _asked(segment, 0) == [(int(segment.positions[0, 0]), int(segment.targets[0, 0]))]


def test_patches_are_put_together_as_the_image_they_were_cut_from():
    from bench.report.example_inputs import _image

    task = make_task({"_target_": "tasks.digits_continuous.DigitsContinuous"})
    sequence = task.segments("test", 0)[0].inputs[0]
    assert np.array_equal(_image(sequence, (8, 8)), sequence.numpy().reshape(8, 8))
    image = np.arange(36.0).reshape(6, 6)
    patches = torch.from_numpy(image.reshape(3, 2, 3, 2).swapaxes(1, 2).reshape(9, 4).copy())
    assert np.array_equal(_image(patches, (3, 3)), image)
