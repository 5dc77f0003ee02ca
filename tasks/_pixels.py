"""Grey images read pixel by pixel: as tokens of a grey level, as real numbers, or as patches of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tasks._classification import Classification, classification_spec, labelled
from tasks.base import Batch, Tokens, Vectors

INPUTS = ("tokens", "continuous")


class PixelSequences(Classification):
    """Which class is a grey image of, read row by row, top left first; `spec.grid` has its rows and columns.

    `tokens` hides from a model that grey levels are ordered, as Long Range Arena wants it; `continuous` gives it their
    values, as the S4 family does. They are different tasks and stand in the id.

    Args:
        input: tokens or continuous.
        side: rows and columns that are read; fewer than the images have are means over blocks of pixels.
        levels: of tokens, 2 .. 256.
        patch: side of the square of pixels at one position, of continuous input; 1: one pixel.

    Class attributes:
        full: rows and columns of the images.
        normal: mean and standard deviation that are taken from continuous values, 0 black and 1 white.

    Raises:
        ValueError: at construction, settings that cannot be, with the nearest that can.
    """

    full: ClassVar[int]
    normal: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, *, input: str, side: int, levels: int = 256, patch: int = 1) -> None:
        sides = [n for n in range(1, self.full + 1) if self.full % n == 0]
        if input not in INPUTS:
            raise ValueError(f'unknown input "{input}"; there are: {", ".join(INPUTS)}')
        if side not in sides:
            raise ValueError(f"side must divide {self.full}, got {side}; nearest: {_nearest(side, sides)}")
        if not 2 <= levels <= 256 or (input == "continuous" and levels != 256):
            raise ValueError(f"levels must be 2 .. 256, and 256 of continuous input, got {levels}")
        patches = [n for n in range(1, side + 1) if side % n == 0] if input == "continuous" else [1]
        if patch not in patches:
            raise ValueError(
                f"patch must divide side={side}, and is 1 where pixels are tokens, got {patch}; "
                f"nearest: {_nearest(patch, patches)}"
            )
        self.input, self.side, self.levels, self.patch = input, side, levels, patch
        grid = side // patch
        values = Tokens(vocab_size=levels) if input == "tokens" else Vectors(dim=patch * patch)
        self.spec = classification_spec(values, self.classes, grid * grid, (grid, grid))

    @property
    def form(self) -> str:
        """How images are read, for the id: tokens-28, tokens-14x16 (levels) or continuous-28/4 (patch)."""
        levels = "" if self.levels == 256 else f"x{self.levels}"
        return f"{self.input}-{self.side}{levels}{'' if self.patch == 1 else f'/{self.patch}'}"

    @abstractmethod
    def images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Grey levels [N, full, full], uint8, and classes [N]."""

    def examples(self, split: str) -> Batch:
        images, labels = self.images(split)
        return labelled(self.read(images), labels, key=self.key)

    def read(self, images: np.ndarray) -> np.ndarray:
        """Images [N, full, full] as sequences: [N, L] uint8 tokens, or [N, L, patch * patch] float32."""
        n, block = len(images), self.full // self.side
        means = images.reshape(n, self.side, block, self.side, block).mean((2, 4), dtype=np.float32)
        if self.input == "tokens":
            return (means * self.levels / 256).astype(np.uint8).reshape(n, -1)
        mean, deviation = self.normal
        grid = self.side // self.patch
        values = ((means / 255 - mean) / deviation).astype(np.float32)
        squares = values.reshape(n, grid, self.patch, grid, self.patch).swapaxes(2, 3)
        return np.ascontiguousarray(squares).reshape(n, grid * grid, -1)

    def features(self, splits: Mapping[str, Batch]) -> dict[str, dict[str, np.ndarray]]:
        """Every pixel's value, from 0 to about 1."""
        scale = self.levels - 1 if self.input == "tokens" else 1
        return {"linear, pixels": {split: part.inputs.flatten(1).numpy() / scale for split, part in splits.items()}}


def _nearest(number: int, valid: list[int]) -> int:
    return min(valid, key=lambda n: abs(n - number))
