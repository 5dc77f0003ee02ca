"""Sensor series of the UCR and UEA archives: motion, speech, appliances, outlines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tasks import _disjoint, _ts
from tasks._classification import Classification, classification_spec, labelled
from tasks.base import Batch, Vectors
from tasks.sources import MissingData, member

FOLDER = "sktime/datasets/data/"
VALID = 0.25  # share of the published train part
NEAR = 0.003  # distance, over their size, of two series that are one
QUANTILES = 0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0


class Set(NamedTuple):
    """Name in the archive, channels, longest series in both parts, and labels."""

    title: str
    channels: int
    longest: int
    classes: tuple[str, ...]


def _numbers(first: int, last: int) -> tuple[str, ...]:
    return tuple(map(str, range(first, last + 1)))


SETS = {
    "basic_motions": Set("BasicMotions", 6, 100, ("Standing", "Running", "Walking", "Badminton")),
    "japanese_vowels": Set("JapaneseVowels", 12, 29, _numbers(1, 9)),
    "plaid": Set("PLAID", 1, 1344, _numbers(0, 10)),
    "acsf1": Set("ACSF1", 1, 1460, _numbers(0, 9)),
    "osu_leaf": Set("OSULeaf", 1, 427, _numbers(1, 6)),
    "arrow_head": Set("ArrowHead", 1, 251, _numbers(0, 2)),
    "gun_point": Set("GunPoint", 1, 150, _numbers(1, 2)),
    "italy_power_demand": Set("ItalyPowerDemand", 1, 24, _numbers(1, 2)),
}


class Sensors(Classification):
    """Which class has produced a series of measurements? Each position is a vector of `patch` moments in a row.

    The published cut is kept: test as it is; of train, series that are in test, too (5 of plaid), are removed, and a
    quarter, each class in the same share, is held back for validation. So accuracies are those of three quarters of
    the published training data. Channels are
    shifted and scaled by mean and standard deviation of that train; shorter series are padded under a mask.

    basic_motions: accelerometer and gyroscope of a watch, 4 activities. japanese_vowels: 12 cepstral coefficients of
    two vowels in a row, 9 speakers. plaid: current of 11 kinds of appliances. acsf1: power of 10 kinds in an hour.
    osu_leaf: outline of leaves of 6 trees. arrow_head: outline of arrow heads, 3 types. gun_point: a hand with or
    without a gun. italy_power_demand: a day's electricity, winter or summer.

    Args:
        data: one of them.
        patch: moments at a position, by which long series become short sequences without loss.
        path: a copy of yours: the wheel of sktime, or a folder with TITLE_TRAIN.ts and TITLE_TEST.ts.

    Source: Bagnall et al. 2018, https://arxiv.org/abs/1811.00075 (UEA); Dau et al. 2019,
    https://arxiv.org/abs/1810.07758 (UCR). Differs: validation is carved from train.
    """

    version = 1
    name = "sensors"
    source = "sensors"

    def __init__(self, *, data: str, patch: int = 1, path: str | None = None) -> None:
        if data not in SETS:
            import difflib

            near = difflib.get_close_matches(data, SETS, n=1, cutoff=0.0)[0]
            raise ValueError(f'unknown data "{data}"; nearest: {near}. All of them: {", ".join(SETS)}')
        self.set = SETS[data]
        if not 1 <= patch <= self.set.longest:
            raise ValueError(f"patch must be from 1 to {self.set.longest}, the longest series, got {patch}")
        self.patch, self.path = patch, path
        self.classes = self.set.classes
        self.protocol = data if patch == 1 else f"{data}-patch{patch}"
        length = -(-self.set.longest // patch)
        self.spec = classification_spec(Vectors(dim=patch * self.set.channels), self.classes, length)

    def examples(self, split: str) -> Batch:
        series, labels = self._splits[split]
        known = np.concatenate(self._splits["train"][0])
        mean, spread = known.mean(0), known.std(0)
        spread[spread == 0] = 1.0
        moments = self.spec.length * self.patch
        inputs = np.zeros((len(series), moments, self.set.channels), dtype=np.float32)
        for place, values in zip(inputs, series, strict=True):
            place[: len(values)] = (values - mean) / spread
        lengths = np.array([-(-len(values) // self.patch) for values in series])
        equal = (lengths == self.spec.length).all() and len({len(values) for values in series}) == 1
        inputs = inputs.reshape(len(series), self.spec.length, -1)
        return labelled(inputs, labels, None if equal else lengths)

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, np.ndarray]]:
        """Of each channel mean, standard deviation, quantiles, and mean size of the steps, in units of their spread."""
        found = {split: np.stack([_summary(values) for values in self._splits[split][0]]) for split in splits}
        mean, spread = found["train"].mean(0), found["train"].std(0) + 1e-9
        return {"linear, statistics": {split: (part - mean) / spread for split, part in found.items()}}

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """With the archive's own floor: the label of the nearest series by Euclid's distance, at equal positions."""
        from sklearn.neighbors import KNeighborsClassifier

        flat = {s: splits[s][0].inputs.cpu().flatten(1).numpy() for s in ("train", "test")}
        labels = {s: splits[s][0].targets[:, 0].cpu().numpy() for s in ("train", "test")}
        nearest = KNeighborsClassifier(n_neighbors=1, algorithm="brute").fit(flat["train"], labels["train"])
        return {**super().solvers(splits), "nearest series": float(nearest.score(flat["test"], labels["test"]))}

    @cached_property
    def _splits(self) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
        train, labels = self._part("TRAIN")
        test, test_labels = self._part("TEST")
        known = _directions([*test, *train])
        kept = _disjoint.distinct(len(known), _disjoint.vector_pairs(known, NEAR)) - len(test)
        kept = kept[kept >= 0]
        cut = _disjoint.stratified(labels[kept], {"train": 1 - VALID, "valid": VALID})
        parts = {split: ([train[row] for row in kept[rows]], labels[kept[rows]]) for split, rows in cut.items()}
        return {**parts, "test": (test, test_labels)}

    def _part(self, part: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Series and class numbers of a published part."""
        file = f"{self.set.title}_{part}.ts"
        content = member("sensors", f"{FOLDER}{self.set.title}/{file}", self.path, alone=False)
        series, labels = _ts.read(content.decode("utf-8", "replace"), file)
        if not series or max(map(len, series)) > self.set.longest or series[0].shape[1] != self.set.channels:
            raise MissingData(
                f"{file} must have series of at most {self.set.longest} moments and {self.set.channels} channels; "
                "type python -m bench.data fetch sensors, or correct task.path"
            )
        if unknown := set(labels) - set(self.classes):
            raise MissingData(f"{file} has the label {min(unknown)}; there are: {', '.join(self.classes)}")
        return series, np.array([self.classes.index(label) for label in labels])


def _directions(series: Sequence[np.ndarray]) -> np.ndarray:
    """Series padded to one length and scaled to norm 1 [N, T F]."""
    found = np.zeros((len(series), max(map(len, series)), series[0].shape[1]))
    for place, values in zip(found, series, strict=True):
        place[: len(values)] = values / max(float(np.linalg.norm(values)), 1e-30)
    return found.reshape(len(series), -1)


def _summary(values: np.ndarray) -> np.ndarray:
    steps = np.abs(np.diff(values, axis=0)).mean(0) if len(values) > 1 else np.zeros(values.shape[1])
    return np.concatenate([values.mean(0), values.std(0), steps, np.quantile(values, QUANTILES, axis=0).ravel()])
