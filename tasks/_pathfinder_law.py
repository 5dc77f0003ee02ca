"""The published settings of Pathfinder by image size, and how the protocols differ from them."""

from __future__ import annotations

from typing import NamedTuple

ANTIALIAS = 2  # sticks and discs are drawn at twice the resolution
DIFFICULTIES = "easy", "intermediate", "hard"


class Law(NamedTuple):
    """Lengths in pixels; numbers are those of Linsley et al.'s generator under the names of theirs that we keep."""

    side: int
    contour_length: int  # sticks of a target snake
    distractor_length: int  # of any other
    num_distractors: int
    padding: int
    margins: tuple[int, ...]  # around a stick, one of them drawn per image
    seed_distance: int  # between the starts of the targets
    marker_radius: float
    paddle_length: int  # of a stick
    thickness: float
    continuity: float  # larger: straighter
    target_contrast: float
    distractor_contrast: float
    centred: bool  # starts stay 2 * seed_distance away from the border, as published
    byte_scale: bool  # the brightest pixel of an image is 255, as scipy.misc.imsave had it
    same_distance: float  # how much farther apart two discs may be in one class than in the other
    rounding: float  # what is taken off before rounding up: 0.5 rounds to the nearest


#        contour lengths, distractor sticks, padding, margins, seed distance, radius, paddle, thickness, continuity,
#        contrast of snakes, of targets among them
SIDES = {
    16: ((3, 4, 6), 6, 1, (1,), 4, 1.0, 2, 0.5, 1.0, 2.0, 0.75),  # ours
    32: ((6, 9, 14), 20, 1, (1,), 7, 1.5, 2, 0.5, 1.0, 2.0, 0.75),
    64: ((6, 9, 14), 22, 1, (1,), 12, 2.5, 5, 1.0, 1.8, 0.8, 1.0),
    128: ((6, 9, 14), 35, 1, (2, 3), 20, 3.0, 5, 1.5, 1.8, 0.9, 1.0),
    256: ((6, 9, 14), 30, 22, (3,), 27, 5.0, 5, 2.0, 1.8, 1.0, 1.0),
}


def law(side: int, difficulty: str, published: bool) -> Law:
    """The law of an image size and difficulty.

    Args:
        published: LRA's; else without the three cues that have nothing to do with the contour: targets start anywhere,
            all snakes are equally bright, and the discs are equally far apart in both classes.
    """
    lengths, sticks, padding, margins, seed, radius, paddle, thickness, continuity, snakes, targets = SIDES[side]
    contour = lengths[DIFFICULTIES.index(difficulty)]
    short = max(1, contour // 3)
    return Law(
        side=side,
        contour_length=contour,
        distractor_length=short,
        num_distractors=sticks // short,
        padding=padding,
        margins=margins,
        seed_distance=seed,
        marker_radius=radius,
        paddle_length=paddle,
        thickness=thickness,
        continuity=continuity,
        target_contrast=snakes * targets,
        distractor_contrast=snakes if published else snakes * targets,
        centred=published,
        byte_scale=published,
        same_distance=float("inf") if published else side / 32,
        rounding=1e-9 if published else 0.5,
    )
