"""Compiled Pathfinder: two dashed snakes among shorter ones, grown stick by stick on a mask, and two discs.

The mask counts what sticks claim, in 1 / 255, so a stick is taken back by subtraction: a snake that is stuck gives up
its last sticks, where the published generator starts the pair again. Imported where data are made: numba takes a second
to load, and the loops, on the first call on a machine, some ten to compile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks._counter import below, compiled, key, start, uniform
from tasks._pathfinder_law import Law
from tasks._pathfinder_tables import FULL, tables

LIMIT = 459  # claims that no two sticks may reach together, 1.8 pixels
TRIES, DISTRACTOR_TRIES, SEED_TRIES = 3, 5, 100  # as published, but the last: tails tried for a free one
SEED_LIMIT = 76  # claims that a published first stick may stand on, 0.3 pixels


@compiled
def _claim(mask, place, sign, t, g, angle):
    for k in range(t.num_pixels[g, angle]):
        mask[place + t.offset[g, angle, k]] += sign * t.claim[g, angle, k]


@compiled
def _fits(mask, place, t, g, angle):
    """Whether a stick may stand there: no pixel is claimed too much."""
    for k in range(t.num_pixels[g, angle]):
        if min(mask[place + t.offset[g, angle, k]], FULL) + t.claim[g, angle, k] >= LIMIT:
            return False
    return True


@compiled
def _free(mask, width, place, margin):
    """How free the pixels within `margin` are, 1: all of them."""
    worst = 0
    for y in range(-margin, margin + 1):
        for x in range(-margin, margin + 1):
            if y * y + x * x <= margin * margin:
                worst = max(worst, mask[place + y * width + x])
    return 1.0 - min(worst, FULL) / FULL


@compiled
def _pivot(y, x, distance, stick, t, law):
    """Set where the next stick turns, `distance` on from (y, x)."""
    stick[3] = np.int64(np.ceil(y + distance * t.unit[stick[5], 0] - law.rounding))
    stick[4] = np.int64(np.ceil(x + distance * t.unit[stick[5], 1] - law.rounding))


@compiled
def _extend(mask, width, frame, stick, t, g, law, state, weight):
    """Draw the stick after `stick` (as in `draw`) into `stick[1]`; False where there is no room.

    The mask counts `stick[0]`, which its successor may touch, so it is taken out for the time of looking.
    """
    side = width - 2 * frame
    y, x, drawn, pivot_y, pivot_x, last = stick[0]
    here = (y + frame) * width + x + frame
    _claim(mask, here, -1, t, g, drawn)
    total = 0.0
    for c in range(t.steps[g]):
        weight[c] = 0.0
        dy, dx, angle = t.step[g, c]
        turn = abs((angle - last + 180) % 360 - 180) * np.pi / 180 * law.continuity
        to_y, to_x = pivot_y + dy, pivot_x + dx
        if turn < np.pi / 2 and 0 <= to_y < side and 0 <= to_x < side:
            place = (to_y + frame) * width + to_x + frame
            weight[c] = np.cos(turn) ** 2 * _free(mask, width, place, t.margin[g])
            if weight[c] > 0 and not _fits(mask, place, t, g, angle):
                weight[c] = 0.0
            total += weight[c]
    _claim(mask, here, 1, t, g, drawn)
    if total < 1e-4:
        return False
    left = uniform(state) * total
    chosen = 0
    for c in range(t.steps[g]):
        if weight[c] > 0:
            chosen = c
            left -= weight[c]
            if left < 0:
                break
    dy, dx, angle = t.step[g, chosen]
    stick[1, 0], stick[1, 1], stick[1, 2], stick[1, 5] = pivot_y + dy, pivot_x + dx, angle, angle
    if law.centred:
        _pivot(pivot_y, pivot_x, law.paddle_length + 2 * t.margin[g], stick[1], t, law)
    else:
        _pivot(stick[1, 0], stick[1, 1], t.margin[g], stick[1], t, law)
    _claim(mask, (stick[1, 0] + frame) * width + stick[1, 1] + frame, 1, t, g, stick[1, 2])
    return True


@compiled
def _seed(mask, width, frame, y, x, angle, border, stick, t, g, law):
    """Try a first stick with its tail at (y, x); False where there is no room.

    As published, a footprint must be free and `border` pixels away from the border; nothing need be at border -1.
    """
    side = width - 2 * frame
    head_y = np.int64(np.ceil(y + law.paddle_length * t.unit[angle, 0] - law.rounding))
    head_x = np.int64(np.ceil(x + law.paddle_length * t.unit[angle, 1] - law.rounding))
    if not (0 <= y < side and 0 <= x < side and 0 <= head_y < side and 0 <= head_x < side):
        return False
    stick[0, 0], stick[0, 1], stick[0, 2], stick[0, 5] = head_y, head_x, angle, angle
    _pivot(head_y, head_x, t.margin[g], stick[0], t, law)
    if law.centred:  # drawn forwards, so from its tail; and the pivot is rounded up twice
        stick[0, 0], stick[0, 1], stick[0, 2] = y, x, (angle + 180) % 360
        _pivot(head_y, head_x, -law.paddle_length - t.margin[g], stick[0], t, law)
        _pivot(stick[0, 3], stick[0, 4], law.paddle_length + 2 * t.margin[g], stick[0], t, law)
    place = (stick[0, 0] + frame) * width + stick[0, 1] + frame
    if not law.centred:
        if not _fits(mask, place, t, g, angle):
            return False
    elif border >= 0:
        for k in range(t.seeds[g, angle]):
            to_y, to_x = y + t.seed[g, angle, k, 0], x + t.seed[g, angle, k, 1]
            if not (border <= to_y < side - border and border <= to_x < side - border):
                return False
            if mask[(to_y + frame) * width + to_x + frame] > SEED_LIMIT:
                return False
    _claim(mask, place, 1, t, g, stick[0, 2])
    return True


@compiled
def _somewhere(mask, width, frame, border, stick, tail, t, g, law, state):
    """A first stick in a direction drawn once, at one of the places that are free for it."""
    angle, span = below(state, 360), width - 2 * frame - 2 * border
    if law.centred and t.seeds[g, angle] == 0:
        return False
    for _ in range(SEED_TRIES):
        tail[0], tail[1] = border + below(state, span), border + below(state, span)
        if _seed(mask, width, frame, tail[0], tail[1], angle, border, stick, t, g, law):
            return True
    return False


@compiled
def _shrink(mask, width, frame, sticks, first, last, t, g):
    """Take back sticks first .. last - 1."""
    for i in range(first, last):
        _claim(mask, (sticks[i, 0] + frame) * width + sticks[i, 1] + frame, -1, t, g, sticks[i, 2])


@compiled
def _pair(mask, width, frame, snakes, tips, t, g, law, state, weight):
    """Two snakes from seeds at their distance, grown in turns; False: start the image again."""
    border = 2 * law.seed_distance if law.centred else 0
    if not _somewhere(mask, width, frame, border, snakes[0], tips[0], t, g, law, state):
        return False
    found = False
    for _ in range(TRIES):
        around, angle = below(state, 360), below(state, 360)
        for axis in range(2):
            tips[2, axis] = np.int64(np.rint(tips[0, axis] + law.seed_distance * t.unit[around, axis]))
        found = _seed(mask, width, frame, tips[2, 0], tips[2, 1], angle, -1, snakes[1], t, g, law)
        if found:
            break
    if not found:
        return False
    length = np.ones(2, np.int64)
    failures, patience = 0, 4 * law.contour_length
    while min(length[0], length[1]) < law.contour_length:
        s = 0 if length[0] <= length[1] else 1
        now = length[s]
        if _extend(mask, width, frame, snakes[s, now - 1 :], t, g, law, state, weight):
            length[s] += 1
            continue
        failures += 1
        if failures > patience:
            return False
        length[s] = max(1, now - 1 - below(state, 3))
        _shrink(mask, width, frame, snakes[s], length[s], now, t, g)
    for s in range(2):
        tips[2 * s + 1] = snakes[s, law.contour_length - 1, :2]
    if law.centred:  # as published: nothing keeps others away from the last stick of the first snake
        _shrink(mask, width, frame, snakes[0], law.contour_length - 1, law.contour_length, t, g)
    return True


@compiled
def _distract(mask, width, frame, others, t, g, law, state, weight):
    """Shorter snakes wherever there is room; returns how many."""
    number, length, tail = 0, law.distractor_length, np.zeros(2, np.int64)
    for _ in range(law.num_distractors):
        for _ in range(DISTRACTOR_TRIES):
            if not _somewhere(mask, width, frame, 0, others[number], tail, t, g, law, state):
                continue
            grown = 1
            while grown < length and _extend(mask, width, frame, others[number, grown - 1 :], t, g, law, state, weight):
                grown += 1
            if grown == length:
                number += 1
                break
            _shrink(mask, width, frame, others[number], 0, grown, t, g)
    return number


@compiled
def _ink(image, width, frame, sticks, contrast, t, g):
    for i in range(len(sticks)):
        angle = sticks[i, 2]
        place = (sticks[i, 0] + frame) * width + sticks[i, 1] + frame
        for k in range(t.num_pixels[g, angle]):
            at = place + t.offset[g, angle, k]
            image[at] = max(image[at], contrast * t.ink[g, angle, k])


@compiled
def _discs(image, width, frame, y, x, t):
    for k in range(len(t.disc)):
        at = np.int64(y + t.disc[k, 0] + frame) * width + np.int64(x + t.disc[k, 1] + frame)
        image[at] = max(image[at], t.disc[k, 2])


@compiled
def _distance(tips, i, j):
    return np.sqrt(np.float64((tips[i, 0] - tips[j, 0]) ** 2 + (tips[i, 1] - tips[j, 1]) ** 2))


@compiled
def _choose(tips, law, state, marked):
    """Two tips to mark, one where a snake starts and one where one ends, and whether it is one snake; -1: none will do.

    A candidate is a pair on one snake and a pair on both that share a tip; which of the two is marked is a coin's
    choice. Unless published, both must be about equally far apart, else the distance would tell one from the other.
    """
    offset, label = below(state, 4), below(state, 2)
    for i in range(4):
        same, shared = (offset + i) % 4 // 2, (offset + i) % 2
        own = 2 * same, 2 * same + 1
        other = (own[0], 3 - own[0]) if shared == 0 else (2 - own[0], own[1])
        if law.centred and shared:
            continue  # as published: the disc at the start stands, the other one moves
        if abs(_distance(tips, *own) - _distance(tips, *other)) > law.same_distance:
            continue
        marked[0], marked[1] = own if label else other
        return label
    return -1


@compiled
def _fill(images, labels, distances, snakes, tips, marked, number, first, key, t, law, frame):
    """One image per row, that of stream `first + row`; returns the number of pairs begun for them."""
    side = law.side
    width = side + 2 * frame
    state, weight = np.zeros(1, np.uint64), np.zeros(t.step.shape[1])
    mask, image = np.zeros(width * width, np.int32), np.zeros(width * width, np.float32)
    others = np.zeros((law.num_distractors + 1, law.distractor_length, 6), np.int64)
    begun = 0
    for i in range(len(images)):
        start(state, key, first + i)
        while True:
            begun += 1
            g = below(state, len(t.margin))
            mask[:] = FULL
            for y in range(law.padding, side - law.padding):
                row = (y + frame) * width + frame
                mask[row + law.padding : row + side - law.padding] = 0
            if not _pair(mask, width, frame, snakes[i], tips[i], t, g, law, state, weight):
                continue
            label = _choose(tips[i], law, state, marked[i])
            if label >= 0:
                break
        labels[i] = label
        distances[i] = _distance(tips[i], marked[i, 0], marked[i, 1])
        number[i] = _distract(mask, width, frame, others, t, g, law, state, weight)
        image[:] = 0
        for s in range(2):
            _ink(image, width, frame, snakes[i, s], law.target_contrast, t, g)
        for s in range(number[i]):
            _ink(image, width, frame, others[s], law.distractor_contrast, t, g)
        for tip in marked[i]:
            _discs(image, width, frame, tips[i, tip, 0], tips[i, tip, 1], t)
        inside = image.reshape(width, width)[frame : frame + side, frame : frame + side]
        top = np.float32(1.0)
        if law.byte_scale:
            top = np.float32(0.0)
            for y in range(side):
                for x in range(side):
                    top = max(top, inside[y, x])
        for y in range(side):
            for x in range(side):
                images[i, y * side + x] = np.uint8(min(np.float32(255), inside[y, x] / top * 255 + np.float32(0.5)))
    return begun


def draw(text: str, first: int, number: int, law: Law) -> dict[str, np.ndarray]:
    """Images of streams first .. first + number - 1 under the key of `text`.

    Returns:
        image [n, side * side] uint8; label [n], 1: both discs on one snake; distance [n] of the discs in pixels;
        sticks [n, 2, contour_length, 6], y, x of the head and angle it is drawn back from there, pivot y, x of the next
        one, and angle the snake goes on in; tips [n, 4, 2], start and end of the first snake and of the second; marked
        [n, 2], the tips with a disc; distractors [n], how many; begun, pairs of snakes begun.
    """
    t, frame = tables(law)
    made: dict[str, Any] = dict(
        image=np.empty((number, law.side**2), np.uint8),
        label=np.empty(number, np.uint8),
        distance=np.empty(number, np.float32),
        sticks=np.zeros((number, 2, law.contour_length, 6), np.int16),
        tips=np.zeros((number, 4, 2), np.int16),
        marked=np.zeros((number, 2), np.int16),
        distractors=np.zeros(number, np.int16),
    )
    begun = _fill(*made.values(), first, key(text), t, law, frame)
    return {**made, "begun": np.array(begun)}
