"""Pictures of sequences of numbers: what is asked is marked, and where the answer can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench.report import figure as f
from bench.report.example_tokens import answer, canvas, context_of, real
from tasks.base import IGNORE, Batch, PerSequence, Reconstruction, Task

CELLS = 36  # of a line


class _Strip(NamedTuple):
    """Numbers in a line, or several: a name, the tokens, colours of the asked and of the sources, answers below."""

    name: str
    tokens: list[int]
    full: dict[int, str]
    pale: dict[int, str]
    below: dict[int, str]


def strips(row: str, task: Task, segment: Batch, rows: Sequence[int]) -> Figure:
    """Sequences as strips of cells: an asked one is filled, its answer beneath, and where it can be read is tinted."""
    single = isinstance(task.spec.output, PerSequence)
    drawn: list[_Strip] = []
    caption = "numbers are token ids"
    for r in rows:
        tokens, context = real(segment.inputs, segment.key_mask, r).tolist(), context_of(segment, r)
        asked = [] if single else _asked(segment, r)
        full, pale = _marks(task, tokens, context, asked)
        below = {position: str(target) for position, target in asked}
        if asked and not isinstance(task.spec.output, Reconstruction):
            caption = "numbers are token ids; full colour: a position that is asked, its answer below"
            where = "where the answer stands, and what it stands behind"
            caption += f"; same colour, pale: {where}" if pale else "; no answer stands in the input"
        elif asked:
            caption = "numbers are token ids; below: what is due, all of it from the last position's state"
        if context:
            drawn.append(_Strip("context", context, {}, pale, {}))
        drawn.append(_Strip("input" if context else "", tokens, full, {} if context else pale, below))
        if single:
            drawn[-1] = drawn[-1]._replace(name=answer(task, int(segment.targets[r, 0])))
    longest = max(len(strip.tokens) for strip in drawn)
    width = -(-longest // -(-longest // CELLS))
    room = width + (2.5 if any(strip.name for strip in drawn) else 0.1)
    steps = [[(1.75 if strip.below else 1.15) for _ in range(0, len(strip.tokens), width)] for strip in drawn]
    gaps = [0.15 if strip.name == "context" else 0.65 for strip in drawn]
    height = sum(map(sum, steps)) + sum(gaps)
    side = min(0.26, 7.4 / room)
    figure = f.new(max(4.5, side * room + 0.3), side * height + 0.75, caption, f"{row}: examples of test")
    ax = canvas(figure, room, height)
    y = 0.1
    for strip, lines, gap in zip(drawn, steps, gaps, strict=True):
        for number, step in enumerate(lines):
            _strip(ax, y, strip, number * width, min(len(strip.tokens), (number + 1) * width))
            y += step
        y += gap
    return figure


def _strip(ax: Axes, y: float, strip: _Strip, first: int, end: int) -> None:
    """One line of a strip."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5}
    for i in range(first, end):
        full, pale = strip.full.get(i), strip.pale.get(i)
        x = i - first
        ax.add_patch(
            Rectangle((x, y), 0.94, 0.94, color=full or pale or "#F3F3F3", alpha=0.35 if pale and not full else 1, lw=0)
        )
        colour = "white" if full else "black" if pale else "#8A8A8A"
        ax.text(x + 0.47, y + 0.5, str(strip.tokens[i]), color=colour, **style)
        ax.text(x + 0.47, y + 1.32, strip.below.get(i, ""), color=full or "black", fontweight="bold", **style)
    if first == 0:
        ax.text(end + 0.2, y + 0.5, strip.name, va="center", fontsize=6.5, color=f.GREY)


def _asked(segment: Batch, row: int) -> list[tuple[int, int]]:
    """Labelled positions of an example with their answers."""
    pairs = zip(segment.positions[row].tolist(), segment.targets[row].tolist(), strict=True)
    return [(position, target) for position, target in pairs if target != IGNORE]


def _marks(
    task: Task, tokens: list[int], context: list[int], asked: list[tuple[int, int]]
) -> tuple[dict[int, str], dict[int, str]]:
    """Colours of asked positions, and of the cells that hold their answers with the key in front of them."""
    if isinstance(task.spec.output, Reconstruction):
        return {position: f.PALETTE[0] for position, _ in asked}, {}
    colours: dict[int, str] = {}
    pale: dict[int, str] = {}
    used: set[int] = set()
    source = context or tokens
    places = [position for position, _ in asked]
    # asked one after the other on a token that says nothing: what is due stands in order
    copied = len(asked) > 2 and len({tokens[i] for i in places}) <= 2 and places[-1] - places[0] == len(places) - 1
    for number, (position, target) in enumerate(asked):
        colours[position] = f.PALETTE[number % len(f.PALETTE)]
        end = position + 1 if task.spec.causal or context else position  # the mask is no key
        seen = range(len(source)) if context or not task.spec.causal else range(position + 1)
        places = [j for j in seen if source[j] == target and (context or j != position)]
        size = 0 if copied else _key(tokens[:end], source, [j for j in seen if context or j != position], target)
        if size:
            last = [j for j in places if source[j - size : j] == tokens[end - size : end]][-1]
            places = [*range(last - size, last + 1)]
        elif len(asked) > 1:
            places = [j for j in places if j not in used][:1]
            used.update(places)
        pale.update(dict.fromkeys(places, colours[position]))
    return colours, pale


def _key(before: list[int], source: list[int], seen: list[int], target: int) -> int:
    """How many tokens up to the question tell the answer, where they stand in front of it; 0: they do not."""
    found = 0
    for size in (3, 2, 1):
        key = before[len(before) - size :]
        behind = {source[j] for j in seen if j >= size and source[j - size : j] == key}
        if target in behind and (not found or behind == {target}):
            found = size
    return found
