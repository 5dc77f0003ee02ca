"""Pathfinder: the law read off the generator's own record, cues that fixed leaves out, bytes, scores and floors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tasks import _pathfinder_draw
from tasks._pathfinder_law import DIFFICULTIES, SIDES, law
from tasks._pathfinder_tables import tables
from tasks.base import IGNORE, SPLITS, Batch, Tokens, Vectors
from tasks.pathfinder import CLASSES, Pathfinder

CONF = Path(__file__).parents[2] / "conf" / "task"
N = 800
SMALL = dict(protocol="fixed", side=16, difficulty="easy", input="tokens", train=120, valid=31, test=43)
_drawn: dict = {}


def drawn(difficulty="hard", published=False, side=32, number=N):
    key = side, difficulty, published, number
    if key not in _drawn:
        _drawn[key] = _pathfinder_draw.draw("test", 0, number, law(side, difficulty, published))
    return _drawn[key]


def segments(sticks, paddle):
    """Tail and head [n, 2, 2] of sticks [n, 6]; a published first one is drawn from its tail."""
    heads, angles = sticks[:, :2].astype(float), np.deg2rad(sticks[:, 2].astype(float))
    ends = np.stack([heads - paddle * np.stack([np.sin(angles), np.cos(angles)], axis=1), heads], axis=1)
    turned = sticks[:, 2] != sticks[:, 5]
    ends[turned] = ends[turned, ::-1]
    return ends


def crossing(a, b):
    """Whether two segments [2, 2] cross."""

    def turn(p, q, r):
        return np.sign((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]))

    return turn(*a, b[0]) * turn(*a, b[1]) < 0 and turn(*b, a[0]) * turn(*b, a[1]) < 0


@pytest.mark.parametrize("published", [False, True])
def test_the_label_says_whether_both_discs_mark_one_snake(published):
    made = drawn(published=published)
    snake, end = made["marked"] // 2, made["marked"] % 2
    assert (made["label"] == (snake[:, 0] == snake[:, 1])).all()
    assert (end == [0, 1]).all(), "a disc where a snake starts, one where a snake ends"
    assert made["label"].mean() == pytest.approx(0.5, abs=4 * 0.5 / N**0.5)
    tips = np.take_along_axis(made["tips"].astype(float), made["marked"][..., None].astype(int), 1)
    assert np.hypot(*(tips[:, 0] - tips[:, 1]).T) == pytest.approx(made["distance"], abs=1e-4)


SNAKES = [(32, "hard", False), (32, "easy", True), (16, "easy", False)]


@pytest.mark.parametrize(("side", "difficulty", "published"), SNAKES)
def test_a_snake_is_a_chain_of_sticks_that_cross_nothing(side, difficulty, published):
    made, rule = drawn(difficulty, published, side), law(side, difficulty, published)
    step = rule.paddle_length + 2 * rule.margins[0]
    slack = 3 if published else 1.5  # pixels are whole, and published ones are rounded up
    for i in range(40):
        lines = [segments(sticks, rule.paddle_length) for sticks in made["sticks"][i]]
        for snake, line in enumerate(lines):
            assert np.hypot(*(made["tips"][i, 2 * snake] - line[0, 0])) < 1.5, "starts at its first tail"
            assert (made["tips"][i, 2 * snake + 1] == line[-1, 1]).all(), "ends at its last head"
            gaps = np.hypot(*(line[1:, 0] - line[:-1, 1]).T)
            assert (gaps < 2 * rule.margins[0] + slack).all()
            assert (np.hypot(*np.diff(line[:, 1], axis=0).T) < step + slack).all()
            turns = np.abs((np.diff(made["sticks"][i, snake, :, 5].astype(int)) + 180) % 360 - 180)
            assert (turns * rule.continuity < 90).all()
        every = np.concatenate(lines)
        assert not any(crossing(every[a], every[b]) for a in range(len(every)) for b in range(a))
        assert ((every[:, 1] >= 0) & (every[:, 1] < side)).all()


def test_every_image_shows_both_discs_in_white_and_ink_under_every_stick():
    made = drawn()
    images = made["image"].reshape(N, 32, 32)
    for i in range(100):
        for y, x in made["tips"][i, made["marked"][i]]:
            assert images[i, y, x] >= 250
        for y, x in made["sticks"][i, ..., :2].reshape(-1, 2):
            assert images[i, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max() > 60


@pytest.mark.parametrize(
    ("difficulty", "zeros", "distractors"),
    list(zip(DIFFICULTIES, (0.775, 0.734, 0.655), (3.45, 1.85, 1.22), strict=True)),
)
def test_published_images_are_as_dark_and_as_empty_as_the_published_generators(difficulty, zeros, distractors):
    """Its code, run: share of pixels that are 0, in 300, 300 and 200 images, and distractors, in 100, 60 and 200."""
    made = drawn(difficulty, published=True)
    assert (made["image"] == 0).mean() == pytest.approx(zeros, abs=0.012)
    assert made["distractors"].mean() == pytest.approx(distractors, abs=0.3)
    assert (made["image"].max(1) == 255).all(), "the brightest pixel of an image is 255"


def test_path_x_is_as_dark_as_the_published_generators():
    made = drawn("hard", published=True, side=128, number=60)
    assert (made["image"] == 0).mean() == pytest.approx(0.86, abs=0.012)
    assert made["distractors"].mean() > 7, "its margins leave all directions to first sticks"


def test_published_first_sticks_point_to_the_upper_left_where_the_margin_is_one():
    """The directions of all first sticks of distractors in 150 images of the published code: 210 to 239 degrees."""
    for difficulty in DIFFICULTIES:
        allowed = np.flatnonzero(tables(law(32, difficulty, published=True))[0].seeds[0])
        assert allowed.tolist() == [*range(210, 241)], "240 by a rounding"
    assert set(np.unique(drawn(published=True)["sticks"][:, 0, 0, 5])) <= {*range(210, 241)}
    assert len(np.unique(drawn()["sticks"][:, 0, 0, 5])) > 200


@pytest.mark.parametrize(
    ("angle", "pixels"),
    [
        (270, {(0, 0): 102, (1, 0): 147, (2, 0): 116}),
        (200, {(0, 0): 93, (0, 1): 66, (1, 0): 24, (1, 1): 105, (1, 2): 121, (2, 2): 6}),
        (135, {(0, 0): 93, (0, 1): 65, (-1, 0): 24, (-1, 1): 111, (-1, 2): 52}),
    ],
)
def test_a_stick_is_the_published_generators_to_the_pixel(angle, pixels):
    """Its lines know no grey and are shrunk by a window of three lobes; faint pixels aside, grey levels as it draws."""
    rule = law(32, "hard", published=True)
    table, frame = tables(rule)
    width, number = rule.side + 2 * frame, table.num_pixels[0, angle]
    y, x = np.divmod(table.offset[0, angle, :number] + frame * width + frame, width)
    ink = np.round(255 * table.ink[0, angle, :number]).astype(int)
    made = {(int(i) - frame, int(j) - frame): int(grey) for i, j, grey in zip(y, x, ink, strict=True) if grey > 5}
    assert made == pixels


def test_published_starts_are_in_the_centre_and_ours_are_anywhere():
    published, fixed = drawn(published=True)["tips"], drawn()["tips"]
    assert set(np.unique(published[:, 0])) == {14, 15, 16}
    assert fixed[:, 0].min() <= 3 and fixed[:, 0].max() >= 28
    for tips in (published, fixed):
        assert np.hypot(*(tips[:, 0] - tips[:, 2]).T.astype(float)) == pytest.approx(7, abs=1.5)


def test_only_published_distractors_are_brighter_than_targets():
    published = law(32, "hard", published=True)
    assert published.distractor_contrast / published.target_contrast == 4 / 3
    for side in SIDES:
        fixed = law(side, "hard", published=False)
        assert fixed.distractor_contrast == fixed.target_contrast


def test_in_fixed_both_classes_share_distance_brightness_and_place():
    """Two-sample tests between the classes; distance is what the published settings give away at easy."""
    from scipy.stats import ks_2samp

    made = drawn("easy", number=3000)
    joined = made["label"] == 1
    tips = np.take_along_axis(made["tips"], made["marked"][..., None].astype(int), 1)
    for value in (made["distance"], made["image"].mean(1), made["image"].std(1), tips[:, 0, 0], tips[:, 1, 1]):
        assert ks_2samp(value[joined], value[~joined]).pvalue > 0.01
    published = drawn("easy", True, number=3000)
    joined = published["label"] == 1
    assert ks_2samp(published["distance"][joined], published["distance"][~joined]).pvalue < 1e-4


def splits_of(task):
    return {split: task.segments(split, 0) for split in SPLITS}


def test_distance_and_brightness_alone_are_near_chance_in_fixed_and_distance_is_not_in_lra():
    floors = {}
    for protocol in ("fixed", "lra"):
        made = drawn("easy", protocol == "lra", number=3000)
        task = Pathfinder(**{**SMALL, "side": 32, "protocol": protocol})
        splits = {}
        for name, rows in (("train", slice(0, 1500)), ("test", slice(1500, 3000))):
            part = {key: torch.from_numpy(made[key][rows]) for key in ("image", "label", "distance")}
            splits[name] = [
                Batch(
                    inputs=part["image"],
                    positions=torch.zeros(1500, 1, dtype=torch.uint8),
                    targets=part["label"][:, None],
                    slices={"distance": part["distance"]},
                )
            ]
        floors[protocol] = task.solvers(splits)
    assert all(abs(value - 0.5) < 4 * 0.5 / 1500**0.5 for value in floors["fixed"].values()), floors
    assert floors["lra"]["disc distance"] > 0.53, floors


@pytest.mark.parametrize("nearer", [0, 1])
def test_the_distance_rule_finds_either_direction(nearer):
    """Discs of one class are nearer than 10, of the other farther: the rule is right everywhere."""
    label = torch.arange(40) % 2
    distance = torch.where(label == nearer, 5.0, 15.0) + torch.linspace(-2, 2, 40)
    batch = Batch(
        inputs=torch.randint(256, (40, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        positions=torch.zeros(40, 1),
        targets=label[:, None],
        slices={"distance": distance},
    )
    assert Pathfinder(**SMALL).solvers({"train": [batch], "test": [batch]})["disc distance"] == 1


def test_image_k_does_not_depend_on_how_many_are_drawn():
    rule = law(32, "hard", published=False)
    part = _pathfinder_draw.draw("test", 700, 3, rule)
    for name in ("image", "label", "sticks", "marked"):
        assert (part[name] == drawn()[name][700:703]).all()
    assert (_pathfinder_draw.draw("other", 0, 3, rule)["image"] != drawn()["image"][:3]).any()


def test_no_image_stands_twice_in_or_across_splits():
    task = Pathfinder(**{**SMALL, "train": 3000, "num_distractors": 0})
    rows = [row.numpy().tobytes() for split in SPLITS for row in task.segments(split, 0)[0].inputs]
    assert len(set(rows)) == len(rows) == 3074


def test_equal_arguments_give_equal_bytes_and_the_data_are_pinned(tmp_path, monkeypatch):
    first = [task.sha256() for (task,) in splits_of(Pathfinder(**SMALL)).values()]
    monkeypatch.setenv("ATTENTION_BENCHMARK_DATA", str(tmp_path))  # made again, not read
    assert [task.sha256() for (task,) in splits_of(Pathfinder(**SMALL)).values()] == first
    assert Pathfinder(**SMALL).segments("test", 1)[0].sha256() != first[2]
    assert first[2]["inputs"].startswith("8c527e8540a9dc13"), "other images: bump Pathfinder.version"


def test_tokens_and_brightness_are_the_same_images_under_two_ids():
    tokens, real = Pathfinder(**SMALL), Pathfinder(**{**SMALL, "input": "continuous"})
    assert tokens.id == "pathfinder/fixed_16_easy_tokens" and real.id == "pathfinder/fixed_16_easy_continuous"
    assert tokens.spec.inputs == Tokens(vocab_size=256) and real.spec.inputs == Vectors(dim=1)
    assert tokens.spec.grid == (16, 16) and tokens.spec.length == 256
    grey, bright = (task.segments("test", 0)[0].rows(slice(None)) for task in (tokens, real))
    assert bright.inputs.shape == (43, 256, 1) and bright.inputs.dtype is torch.float32
    assert torch.equal((bright.inputs[..., 0] * 255).round().long(), grey.inputs)
    assert torch.equal(bright.targets, grey.targets) and grey.key_mask is None


def test_accuracy_is_counted_by_class_and_distance():
    task = Pathfinder(**SMALL)
    segment = task.segments("test", 0)[0]
    scores = {score.slice: score for score in task.score(torch.ones_like(segment.targets), segment)}
    assert scores["class", "joined"].value == 1 and scores["class", "apart"].value == 0
    assert scores["all", ""].value == pytest.approx(segment.targets.double().mean().item())
    for key in ("class", "disc_distance"):
        assert sum(score.count for (name, _), score in scores.items() if name == key) == 43
    assert int((segment.labels() != IGNORE).sum()) == 43 and len(CLASSES) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(protocol="s5"), 'unknown protocol "s5"; nearest: '),
        (dict(difficulty="medium"), 'unknown difficulty "medium"; nearest: '),
        (dict(input="token"), 'unknown input "token"; nearest: tokens. All of them: tokens, continuous'),
        (dict(side=30), "side must be one of 16, 32, 64, 128, 256, got 30; nearest: 32"),
        (dict(num_distractors=-1), "num_distractors must be a whole number of at least 0, got -1"),
        (dict(test=0), "test must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_without_images_are_one_line(change, message):
    with pytest.raises(ValueError) as error:
        Pathfinder(**{**SMALL, **change})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_s4_has_the_images_of_lra_as_numbers():
    settings = SMALL | dict(side=32)
    tokens = Pathfinder(**settings | dict(protocol="lra"))
    numbers = Pathfinder(**settings | dict(protocol="s4", input="continuous"))
    assert (tokens.id, numbers.id) == ("pathfinder/lra_32_easy_tokens", "pathfinder/s4_32_easy_continuous")
    (one,), (other,) = tokens.segments("test", 0), numbers.segments("test", 0)
    assert torch.equal((other.inputs[..., 0].float() * 255).round().to(torch.uint8), one.inputs)
    assert torch.equal(one.targets, other.targets)
    with pytest.raises(ValueError, match=r"protocol s4 has input=continuous, got tokens; type task\.protocol=lra"):
        Pathfinder(**settings | dict(protocol="s4"))


@pytest.mark.parametrize(
    "row", ["pathfinder16", "pathfinder32", "pathfinder32_lra", "pathfinder32_s4", "pathx", "pathx_lra", "pathx_s4"]
)
def test_rows_name_every_keyword(row):
    given = yaml.safe_load((CONF / f"{row}.yaml").read_text())
    del given["_target_"]
    task = Pathfinder(**given)
    assert set(given) == {*SMALL, "num_distractors"}
    if row == "pathx_lra":
        assert task.id == "pathfinder/lra_128_hard_tokens" and task.spec.length == 16384
        assert task.law.contour_length == 14 and task.law.distractor_length == 4 and task.law.num_distractors == 8


def test_an_unknown_split_is_one_line():
    with pytest.raises(ValueError, match='unknown split "dev"; there are: train, valid, test'):
        Pathfinder(**SMALL).segments("dev", 0)
