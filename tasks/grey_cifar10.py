"""CIFAR-10 in grey, read pixel by pixel: the image task of Long Range Arena."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tasks import _cache, _disjoint, sources
from tasks._pixels import PixelSequences
from tasks.base import Batch

PROTOCOLS = ("fixed", "lra", "s4")
ONLY = {"lra": "tokens", "s4": "continuous"}  # the input of a published protocol
NEAR = 4 * 32  # Euclid's distance of 1,024 grey levels that differ by 4 each


class GreyCIFAR10(PixelSequences):
    """Which of ten things is in a photograph of 32 x 32 pixels: 1,024 grey levels, row by row.

    Protocols, in the id; all have CIFAR-10's own 10,000 test images:

    - fixed: of the 50,000 others those that nearly equal a test image are dropped, and a tenth of the rest, each class
      in the same share and near duplicates together, becomes valid. Grey levels are rounded. Input tokens, without a
      padding id, or continuous with S4's normalisation.
    - lra: the last 5,000 images of the hub's file (theirs: of TensorFlow's) are valid, grey levels are cut to integers,
      and black pixels are masked, because Long Range Arena's models take id 0 for padding.
    - s4: continuous; valid is a tenth drawn by torch.randperm with seed 42.

    Args:
        protocol: fixed, lra or s4.
        input: tokens or continuous; lra has tokens, s4 continuous.
        path: a copy of yours of the hub's data set, see `tasks.sources.table`.

    Raises:
        MissingData: at construction, when the data are not on this machine.

    Source: Krizhevsky 2009; Tay et al. 2020 (Long Range Arena), https://arxiv.org/abs/2011.04006, section 2.2.4, and
    https://github.com/google-research/long-range-arena; S4: https://github.com/state-spaces/s4. Differs, lra: masked
    pixels are left out of the mean that our encoder pools, too. `NEAR` was chosen without the images; Barz and Denzler
    2020, https://arxiv.org/abs/1902.00423, list duplicates of more kinds.
    """

    version = 2
    name = "grey_cifar10"
    source = "cifar10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    full = 32
    normal = 122.6 / 255, 61.0 / 255

    def __init__(self, *, protocol: str, input: str, path: str | None = None) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f'unknown protocol "{protocol}"; there are: {", ".join(PROTOCOLS)}')
        if (wanted := ONLY.get(protocol, input)) != input:
            raise ValueError(f"protocol {protocol} has input={wanted}, got {input}; type task.protocol=fixed for both")
        super().__init__(input=input, side=self.full)
        sources.where("cifar10", path)
        self.path = path
        self.protocol = protocol if protocol in ONLY else f"{protocol}-{input}"

    def images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        name = "test" if split == "test" else "train"
        pixels, labels = self._grey(name)
        return (pixels, labels) if split == "test" else (pixels[self._cut[split]], labels[self._cut[split]])

    def examples(self, split: str) -> Batch:
        batch = super().examples(split)
        return dataclasses.replace(batch, key_mask=batch.inputs != 0) if self.protocol == "lra" else batch

    @cached_property
    def _tables(self) -> dict[str, Any]:
        return {split: sources.table("cifar10", split, self.path) for split in ("train", "test")}

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {split: sources.contents(table) for split, table in self._tables.items()}

    def _grey(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Grey levels [N, 32, 32] and classes [N] of one of the two published splits."""
        cut = self.protocol == "lra"
        key = dict(task=self.name, version=self.version, grey=split, cut=cut, data=self._contents[split])
        arrays = _cache.arrays(key, lambda: decoded(self._tables[split], cut))
        return arrays["pixels"], arrays["labels"]

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        """Rows of the published train split that are train and valid."""
        pixels, labels = self._grey("train")
        tenth = len(labels) - int(0.9 * len(labels))
        if self.protocol == "lra":
            return {"train": np.arange(len(labels) - tenth), "valid": np.arange(len(labels) - tenth, len(labels))}
        if self.protocol == "s4":
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(42)).numpy()
            return {"train": order[:-tenth], "valid": order[-tenth:]}

        def cut() -> dict[str, np.ndarray]:
            tested = self._grey("test")[0]
            count = len(labels) + len(tested)
            groups = _disjoint.groups_of(count, _disjoint.vector_pairs(np.concatenate([pixels, tested]), NEAR))
            kept = np.flatnonzero(~np.isin(groups[: len(labels)], groups[len(labels) :]))
            parts = _disjoint.stratified(labels[kept], {"train": 0.9, "valid": 0.1}, groups=groups[kept])
            return {split: kept[rows] for split, rows in parts.items()}

        key = dict(task=self.name, version=self.version, near=NEAR, data=self._contents)
        return _cache.arrays(key, cut)


def decoded(table: Any, cut: bool) -> dict[str, np.ndarray]:
    """Pixels and labels of a table with columns img (or image) and label.

    Raises:
        MissingData: it has other columns, or other images.
    """
    names = table.column_names
    image = next((name for name in ("img", "image") if name in names), None)
    if image is None or "label" not in names:
        raise sources.MissingData(f"cifar10 must have columns img and label, got {', '.join(names)}; correct task.path")
    pixels = np.empty((len(table), 32, 32), np.uint8)
    for i, row in enumerate(table.select_columns([image])):
        colours = np.asarray(row[image].convert("RGB"))
        if colours.shape != (32, 32, 3):
            raise sources.MissingData(f"image {i} of cifar10 is {colours.shape[:2]} and must be (32, 32)")
        pixels[i] = grey(colours, cut)
    return {"pixels": pixels, "labels": np.array(table["label"], dtype=np.uint8)}


def grey(colours: np.ndarray, cut: bool = False) -> np.ndarray:
    """Luma of [..., 3] red, green and blue levels, uint8.

    Args:
        cut: (0.2989 R + 0.587 G + 0.114 B) / 255 times 255.5, cut to an integer, as TensorFlow's rgb_to_grayscale of
            integers; False: the weights of ITU-R 601 in units of 2^-16, rounded, as Pillow.
    """
    red, green, blue = np.moveaxis(colours.astype(np.int64), -1, 0)
    if cut:
        return ((2989 * red + 5870 * green + 1140 * blue) * 511 // (10000 * 510)).astype(np.uint8)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
