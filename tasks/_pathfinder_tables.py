"""What sticks, discs and steps of Pathfinder look like, worked out once for every whole degree.

A stick is `paddle_length` long and drawn back from its head. It inks some pixels and claims more: itself and `margin`
around it, where no other stick may stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tasks._pathfinder_law import ANTIALIAS, Law

FULL = 255  # a pixel that is claimed as a whole


class Tables(NamedTuple):
    """What sticks and steps look like: by margin [G] and angle [360]; offsets are in the flat, framed mask."""

    num_pixels: np.ndarray  # [G, 360], of a stick
    offset: np.ndarray  # [G, 360, K]
    ink: np.ndarray  # [G, 360, K] float32
    claim: np.ndarray  # [G, 360, K] int32, 0 .. 255
    steps: np.ndarray  # [G] heads that a pivot can reach
    step: np.ndarray  # [G, C, 3] y, x, angle
    margin: np.ndarray  # [G]
    disc: np.ndarray  # [D, 3] y, x and brightness
    unit: np.ndarray  # [360, 2] sine and cosine


def tables(law: Law) -> tuple[Tables, int]:
    """Tables of a law, and the width of the frame around the mask that every stick and disc inside stays within."""
    frame = law.paddle_length + int(np.ceil(max(law.thickness, law.marker_radius))) + max(law.margins) + 1
    width = law.side + 2 * frame
    sticks = [[_stick(law, margin, np.deg2rad(angle)) for angle in range(360)] for margin in law.margins]
    shape = len(law.margins), 360, max(len(stick) for group in sticks for stick in group)
    offset, ink, claim = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for g, group in enumerate(sticks):
        for angle, stick in enumerate(group):
            n = len(stick)
            offset[g, angle, :n] = stick[:, 0] * width + stick[:, 1]
            ink[g, angle, :n], claim[g, angle, :n] = stick[:, 2], np.round(FULL * stick[:, 3])
    steps = [np.array(list(_steps(law.paddle_length + margin))) for margin in law.margins]
    step = np.zeros((len(steps), max(map(len, steps)), 3), np.int64)
    for g, ring in enumerate(steps):
        step[g, : len(ring)] = ring
    angles = np.deg2rad(np.arange(360))
    y, x = _fine(int(np.ceil(law.marker_radius)) + 1)
    return Tables(
        num_pixels=np.array([[len(stick) for stick in group] for group in sticks]),
        offset=offset,
        ink=ink,
        claim=claim,
        steps=np.array([len(ring) for ring in steps]),
        step=step,
        margin=np.array(law.margins, np.int64),
        disc=_pixels(np.hypot(y, x) <= ANTIALIAS * law.marker_radius).astype(np.float32),
        unit=np.stack([np.sin(angles), np.cos(angles)], axis=1),
    ), frame


def _stick(law: Law, margin: int, angle: float) -> np.ndarray:
    """Pixels [K, 4] of a stick with its head at 0: y, x, ink and claim, each up to 1."""
    y, x = _fine(law.paddle_length + int(np.ceil(law.thickness)) + margin)
    back = -np.array([np.sin(angle), np.cos(angle)])
    along = np.clip(y * back[0] + x * back[1], 0, ANTIALIAS * law.paddle_length)
    away = np.hypot(y - along * back[0], x - along * back[1]) - ANTIALIAS * law.thickness / 2
    return _pixels(away <= 0, away <= ANTIALIAS * margin)


def _fine(reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of a fine patch, its centre in the middle of a pixel: upright lines there shrink to sharp ones."""
    line = np.arange(-ANTIALIAS * reach, ANTIALIAS * reach + 1)
    return np.meshgrid(line, line, indexing="ij")


def _pixels(*patches: np.ndarray) -> np.ndarray:
    """Pixels of fine patches [F, F] that are not 0 at the image's resolution: [K, 2 + patches], y, x, brightness."""
    reach = len(patches[0]) // (2 * ANTIALIAS)
    shrunk = [_shrunk(patch, 2 * reach + 1) for patch in patches]
    rows, columns = np.nonzero(np.max(shrunk, axis=0))
    return np.stack([rows - reach, columns - reach, *(patch[rows, columns] for patch in shrunk)], axis=1)


def _shrunk(patch: np.ndarray, side: int) -> np.ndarray:
    """A patch as [side, side]: Lanczos's window of three lobes, rows first, then columns.

    Each time it is rounded to 1 / 255 and cut off at 0 and 1, as images of bytes are: that leaves out the faint
    products of two negative lobes.
    """
    scale = len(patch) / side
    centres = (np.arange(side)[:, None] + 0.5) * scale - 0.5
    away = (np.arange(len(patch)) - centres) / scale
    weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0.0)
    weights /= weights.sum(1, keepdims=True)
    rows = np.round(255 * np.clip(weights @ patch, 0, 1)) / 255
    return np.round(255 * np.clip(rows @ weights.T, 0, 1)) / 255


def _steps(radius: int) -> Iterator[tuple[int, int, int]]:
    """Whole pixels on a circle around 0, with their angles in degrees."""
    for y in range(-radius - 1, radius + 2):
        for x in range(-radius - 1, radius + 2):
            if abs(np.hypot(y, x) - radius) < 0.5:
                yield y, x, round(np.degrees(np.arctan2(y, x))) % 360
