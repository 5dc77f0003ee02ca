"""What sticks, discs and steps of Pathfinder look like, worked out once for every whole degree.

A stick is `paddle_length` long and drawn back from its head. It inks some pixels and claims more: itself and `margin`
around it, where no other stick may stand.
"""

from __future__ import annotations

import functools
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
    seeds: np.ndarray  # [G, 360] pixels from the tail that a first stick of the published generator must find free;
    seed: np.ndarray  # [G, 360, S, 2] y, x of them; none: it finds no place for this direction, ever
    margin: np.ndarray  # [G]
    disc: np.ndarray  # [D, 3] y, x and brightness
    unit: np.ndarray  # [360, 2] sine and cosine


@functools.lru_cache(4)
def tables(law: Law) -> tuple[Tables, int]:
    """Tables of a law, and the width of the frame around the mask that every stick and disc inside stays within."""
    reach = int(np.ceil(law.marker_radius)) + 2  # of a disc, with what the window leaves around it
    frame = max(law.paddle_length + int(np.ceil(law.thickness)) + max(law.margins) + 1, reach)
    width = law.side + 2 * frame
    sticks = [[_stick(law, margin, np.deg2rad(angle)) for angle in range(360)] for margin in law.margins]
    shape = len(law.margins), 360, max(len(stick) for group in sticks for stick in group)
    offset, ink, claim = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for g, group in enumerate(sticks):
        for angle, stick in enumerate(group):
            n = len(stick)
            offset[g, angle, :n] = stick[:, 0] * width + stick[:, 1]
            ink[g, angle, :n], claim[g, angle, :n] = stick[:, 2], np.round(FULL * stick[:, 3])
    seeds = [[_footprint(group[angle - 180]) for angle in range(360)] for group in sticks]
    seed = np.zeros((len(seeds), 360, max(len(pixels) for group in seeds for pixels in group), 2), np.int64)
    for g, group in enumerate(seeds):
        for angle, pixels in enumerate(group):
            seed[g, angle, : len(pixels)] = pixels
    ring = _floored if law.centred else _steps
    steps = [np.array(list(ring(law.paddle_length + margin))) for margin in law.margins]
    step = np.zeros((len(steps), max(map(len, steps)), 3), np.int64)
    for g, heads in enumerate(steps):
        step[g, : len(heads)] = heads
    angles = np.deg2rad(np.arange(360))
    line = np.arange(-ANTIALIAS * reach, ANTIALIAS * (reach + 1))  # unlike a stick's, its middle is not a pixel's
    y, x = np.meshgrid(line, line, indexing="ij")
    return Tables(
        num_pixels=np.array([[len(stick) for stick in group] for group in sticks]),
        offset=offset,
        ink=ink,
        claim=claim,
        steps=np.array([len(heads) for heads in steps]),
        step=step,
        seeds=np.array([[len(pixels) for pixels in group] for group in seeds]),
        seed=seed,
        margin=np.array(law.margins, np.int64),
        disc=_pixels(np.hypot(y, x) <= ANTIALIAS * law.marker_radius).astype(np.float32),
        unit=np.stack([np.sin(angles), np.cos(angles)], axis=1),
    ), frame


def _stick(law: Law, margin: int, angle: float) -> np.ndarray:
    """Pixels [K, 4] of a stick with its head at 0: y, x, ink and claim, each up to 1."""
    reach = ANTIALIAS * (law.paddle_length + int(np.ceil(law.thickness)) + margin)
    end = np.ceil(-ANTIALIAS * law.paddle_length * np.array([np.sin(angle), np.cos(angle)]) - law.rounding)
    line = np.arange(-reach, reach + 1)
    y, x = np.meshgrid(line, line, indexing="ij")
    # one pixel of every row or column for a line one pixel wide, as lines are drawn that know no grey
    (long, run), (across, rise) = sorted([(y, end[0]), (x, end[1])], key=lambda axis: -abs(axis[1]))
    half = (1 + (ANTIALIAS * law.thickness - 1) * np.hypot(run, rise) / abs(run)) / 2
    away = (across - long * rise / run) * (-1 if rise > 0 else 1)
    drawn = (-half <= away + 1e-9) & (away + 1e-9 < half) & (long * np.sign(run) >= 0) & (long * run <= run**2)
    gaps = np.hypot(y[..., None] - y[drawn], x[..., None] - x[drawn]).min(-1)
    return _pixels(drawn, gaps <= ANTIALIAS * margin)


def _footprint(stick: np.ndarray) -> np.ndarray:
    """Pixels [S, 2] from its tail that must be free for a first stick in the published generator.

    These are the pixels it claims as a whole, shifted by one pixel down and right, since the generator takes the pixel
    after the middle of an odd window for its middle. It tests them by a dilation that has no value where all of them
    are off the image, and takes one such pixel for "nowhere is a place": then none are returned. With margin 1, this
    leaves directions to the upper left only, 9 % of all, which is why LRA's small images hold few distractors.

    Args:
        stick: [K, 4], drawn from the tail, which is at 0.
    """
    pixels = stick[stick[:, 3] == 1, :2].astype(np.int64) + 1
    corners = [(pixels * sign >= 0).all(1).any() for sign in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    return pixels if all(corners) else pixels[:0]


def _pixels(*patches: np.ndarray) -> np.ndarray:
    """Pixels of fine patches [F, F] that are not 0 at the image's resolution: [K, 2 + patches], y, x, brightness."""
    reach = len(patches[0]) // (2 * ANTIALIAS)
    shrunk = [_shrunk(patch, 2 * reach + 1) for patch in patches]
    rows, columns = np.nonzero(np.max(shrunk, axis=0))
    return np.stack([rows - reach, columns - reach, *(patch[rows, columns] for patch in shrunk)], axis=1)


def _shrunk(patch: np.ndarray, side: int) -> np.ndarray:
    """A patch as [side, side]: Lanczos's window of three lobes, along rows first, then along columns.

    Each time it is rounded to 1 / 255 and cut off at 0 and 1, as images of bytes are: that leaves out the faint
    products of two negative lobes.
    """
    scale = len(patch) / side
    centres = (np.arange(side)[:, None] + 0.5) * scale - 0.5
    away = (np.arange(len(patch)) - centres) / scale
    weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0.0)
    weights /= weights.sum(1, keepdims=True)
    rows = np.round(255 * np.clip(patch @ weights.T, 0, 1)) / 255
    return np.round(255 * np.clip(weights @ rows, 0, 1)) / 255


def _steps(radius: int) -> Iterator[tuple[int, int, int]]:
    """Whole pixels on a circle around 0, with their angles in degrees."""
    for y in range(-radius - 1, radius + 2):
        for x in range(-radius - 1, radius + 2):
            if abs(np.hypot(y, x) - radius) < 0.5:
                yield y, x, round(np.degrees(np.arctan2(y, x))) % 360


def _floored(radius: int) -> Iterator[tuple[int, int, int]]:
    """The same as published: points on the circle a pixel apart, each cut down to whole pixels."""
    angles = np.arange(0, 2 * np.pi, 1 / radius)
    for y, x in np.unique(np.floor(radius * np.stack([np.sin(angles), np.cos(angles)], axis=1) + 1e-9), axis=0):
        yield int(y), int(x), round(np.degrees(np.arctan2(y, x))) % 360
