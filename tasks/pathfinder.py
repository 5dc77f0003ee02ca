"""Pathfinder and Path-X: are two discs joined by a dashed line? From Long Range Arena."""

from __future__ import annotations

import difflib
import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks import _cache
from tasks._batches import in_order, shuffled
from tasks._mqar_segments import whole
from tasks._pathfinder_law import DIFFICULTIES, SIDES, law
from tasks.base import SPLITS, Batch, Metric, PerSequence, Score, Task, TaskSpec, Tokens, Vectors

WORDS = {"protocol": ("fixed", "lra", "s4"), "difficulty": DIFFICULTIES, "input": ("tokens", "continuous")}
CLASSES = "apart", "joined"
CHUNK = 1024  # images drawn at a time; their records of sticks need not all be in memory at once


class Pathfinder(Task):
    """Two long dashed snakes among shorter ones, and two discs: do both mark ends of one snake? Half of the time, yes.

    Every image holds the same: two snakes of equal length, distractors, and a disc where a snake starts and one where a
    snake ends. Only which ends are marked tells the classes apart, so nothing but following the dashes helps. The image
    is read row by row: side * side positions, 1,024 for Pathfinder-32 and 16,384 for Path-X (128).

    Images are streams of (split, seed, number), so none depends on a worker or on another one. Of images that occur
    twice, which small ones do, the first is kept, test before valid before train.

    Protocols:
        fixed: three cues are taken out that the published settings leave in. Snakes start anywhere (published at 32:
            the first of them within 3 x 3 pixels in the centre, the second 7 pixels away); distractors are as bright as
            targets (published at 32: brighter by a third); both classes have discs equally far apart (published: a
            threshold on the distance is right more often than not). White is 255 in every image.
        lra: the settings of Long Range Arena's data, those cues included, and images scaled to their brightest pixel.
            Its generator finds places only for first sticks that point to the upper left, at 32 x 32 9 % of all
            directions, and gives up soon: of 10, 6 and 5 distractors that are asked for at 32 (easy, intermediate,
            hard) 3.4, 1.9 and 1.2 appear, so do they here, and 77, 73 and 66 % of the pixels are 0, at Path-X 87 %.
            Its models mask black pixels as padding, because both have id 0. Here every pixel is seen.
        s4: the images of `lra`, as real numbers.

    Tokens are the 256 grey levels, whose order a model must find out by itself, as LRA demands; there is no padding.
    `continuous` gives brightness in [0, 1], as S4 reads these tasks, which makes it another task; it stands in the id.

    Args:
        protocol: fixed, lra or s4.
        side: of the image: 16 (ours), 32, 64, 128 (Path-X) or 256.
        difficulty: easy, intermediate or hard: snakes of 6, 9 or 14 sticks; 3, 4 or 6 at 16 x 16. LRA reports hard.
        input: tokens or continuous; s4 has continuous.
        train, valid, test: number of images; published: 160000, 20000, 20000.
        num_distractors: shorter snakes; null: the published number.

    Raises:
        ValueError: at construction, an unknown word or size.

    Source: Linsley et al. 2018, https://arxiv.org/abs/1805.08315; Tay et al. 2020 (Long Range Arena),
    https://arxiv.org/abs/2011.04006, section 2.2.5, settings from its description in TensorFlow Datasets; the published
    generator, https://github.com/drewlinsley/pathfinder, for the law of the snakes; LRA's files were not seen, what is
    said of them is what that code does when it runs. Differs: a snake that is stuck takes back one to three sticks,
    where theirs throws away the pair; of all places for the next stick those that touch another one are left out before
    drawing, not after; claims of sticks add up, where theirs keep the larger one; at 64 x 64 sticks are an eighth
    brighter at a slant; splits are streams, not cuts of one file.
    """

    version = 2
    name = "pathfinder"
    classes = CLASSES

    def __init__(
        self,
        *,
        protocol: str,
        side: int,
        difficulty: str,
        input: str,
        train: int,
        valid: int,
        test: int,
        num_distractors: int | None = None,
    ):
        for word, value in dict(protocol=protocol, difficulty=difficulty, input=input).items():
            if value not in WORDS[word]:
                near = difflib.get_close_matches(str(value), WORDS[word], n=1, cutoff=0.0)[0]
                raise ValueError(f'unknown {word} "{value}"; nearest: {near}. All of them: {", ".join(WORDS[word])}')
        if protocol == "s4" and input != "continuous":
            raise ValueError(f"protocol s4 has input=continuous, got {input}; type task.protocol=lra for tokens")
        if side not in SIDES or isinstance(side, bool):
            nearest = min(SIDES, key=lambda known: abs(known - side)) if isinstance(side, (int, float)) else 32
            raise ValueError(f"side must be one of {', '.join(map(str, SIDES))}, got {side!r}; nearest: {nearest}")
        self.numbers = dict(train=train, valid=valid, test=test)
        for name, number in self.numbers.items():
            whole(name, number, 1)
        self.law = law(side, difficulty, published=protocol != "fixed")
        if num_distractors is not None:
            whole("num_distractors", num_distractors, 0)
            self.law = self.law._replace(num_distractors=num_distractors)
        self.continuous = input == "continuous"
        self.protocol = f"{protocol}_{side}_{difficulty}_{input}"
        self.spec = TaskSpec(
            inputs=Vectors(dim=1) if self.continuous else Tokens(vocab_size=256),
            output=PerSequence(num_classes=2),
            length=side * side,
            grid=(side, side),
            causal=False,
            metrics={
                "accuracy": Metric(unit="fraction", higher_is_better=True),
                "loss": Metric(unit="nats", higher_is_better=False),
            },
            primary="accuracy",
            chance=0.5,
        )

    # -- data -------------------------------------------------------------------------------------

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        key = dict(task=self.name, version=self.version, law=self.law._asdict(), numbers=self.numbers)
        stored = _cache.arrays({**key, "seed": operator.index(seed)}, lambda: self._draw(seed))
        made = {name: stored[f"{split}_{name}"] for name in ("image", "label", "distance")}
        images = torch.from_numpy(made["image"])
        targets = torch.from_numpy(made["label"])[:, None]
        return [
            Batch(
                inputs=(images.to(torch.float16) / 255)[..., None] if self.continuous else images,
                positions=torch.zeros_like(targets),
                targets=targets,
                slices={"class": targets[:, 0], "distance": torch.from_numpy(made["distance"])},
            )
        ]

    def _draw(self, seed: int) -> dict[str, np.ndarray]:
        """All splits, a chunk of images at a time."""
        from tasks import _pathfinder_draw

        seen: set[bytes] = set()
        made: dict[str, np.ndarray] = {}
        for split in reversed(SPLITS):
            number = self.numbers[split]
            made[f"{split}_image"] = np.empty((number, self.law.side**2), np.uint8)
            made[f"{split}_label"] = np.empty(number, np.uint8)
            made[f"{split}_distance"] = np.empty(number, np.float32)
            found, first = 0, 0
            while found < number:
                count = min(CHUNK, number - found)
                part = _pathfinder_draw.draw(f"pathfinder {split} seed={seed}", first, count, self.law)
                rows = []
                for row, image in enumerate(part["image"]):
                    mark = hashlib.blake2b(image.data, digest_size=16).digest()
                    if mark not in seen:
                        seen.add(mark)
                        rows.append(row)
                for name in ("image", "label", "distance"):
                    made[f"{split}_{name}"][found : found + len(rows)] = part[name][rows]
                found, first = found + len(rows), first + count
        return made

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        whole("batch_size", batch_size, 1)
        if generator is None:
            yield from in_order(segments, batch_size)
        else:
            yield from shuffled(segments, batch_size, generator)

    # -- scores -----------------------------------------------------------------------------------

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Accuracy of predictions [N, 1]: over all, by class, and by distance of the discs in quarters of the side."""
        if predictions.shape != segment.targets.shape:
            raise ValueError(f"predictions must be {list(segment.targets.shape)}, got {list(predictions.shape)}")
        right = (predictions == segment.targets).squeeze(1).double()
        scores = [Score(metric="accuracy", value=right.mean().item(), count=len(right))]
        quarter = self.law.side // 4
        groups: dict[str, tuple[Tensor, Callable[[int], str]]] = {
            "class": (segment.slices["class"].long(), lambda value: CLASSES[value]),
            "disc_distance": (
                (segment.slices["distance"] / quarter).long(),
                lambda value: f"{value * quarter}-{(value + 1) * quarter}",
            ),
        }
        for key, (values, name) in groups.items():
            for value in values.unique().tolist():
                part = right[values == value]
                slice_ = key, name(value)
                scores.append(Score(metric="accuracy", value=part.mean().item(), count=len(part), slice=slice_))
        return scores

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> Mapping[str, float]:
        """Accuracy on test of two rules fitted on train that follow no dash: the distance of the discs against a
        threshold, and the mean and spread of brightness in a logistic regression."""
        from sklearn.linear_model import LogisticRegression

        train, test = splits["train"][0], splits["test"][0]
        known, wanted = (part.targets[:, 0].cpu().numpy() for part in (train, test))
        near, far = (part.slices["distance"].cpu().numpy() for part in (train, test))
        order = np.argsort(near)
        count = np.arange(len(known) + 1)
        ones = np.concatenate([[0], np.cumsum(known[order], dtype=np.int64)])  # among the k nearest
        right = ones + (len(known) - ones[-1]) - (count - ones)  # of the rule "joined among the k nearest"
        flip = len(known) - right.min() > right.max()  # the opposite rule is better
        k = right.argmin() if flip else right.argmax()
        limit = near[order][k - 1] if k else -np.inf
        light = [_brightness(part) for part in (train, test)]
        centre, scale = light[0].mean(0), light[0].std(0)
        model = LogisticRegression().fit((light[0] - centre) / scale, known)
        return {
            "disc distance": float((((far <= limit) != flip) == wanted).mean()),
            "brightness": float((model.predict((light[1] - centre) / scale) == wanted).mean()),
        }


def _brightness(segment: Batch) -> np.ndarray:
    """Mean and standard deviation [N, 2] of the pixels of every image, some images at a time."""
    parts = [rows.flatten(1).float() for rows in segment.inputs.cpu().split(CHUNK)]
    return torch.cat([torch.stack([rows.mean(1), rows.std(1)], dim=1) for rows in parts]).numpy()
