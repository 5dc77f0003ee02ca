"""Pictures of token sequences: strips of numbers with what is asked and where it can be read, and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench.report import figure as f
from tasks.base import IGNORE, Batch, PerSequence, Reconstruction, Task

LETTER, LINE = 0.062, 0.15  # inches of a letter and of a line of text
WIDTH = 112  # letters of a line
LONGEST = 3  # lines of one text
CELLS = 36  # of a line of numbers
SHADES = {"masked": f.PALETTE[1], "random": f.PALETTE[3], "kept": f.PALETTE[2]}


class _Strip(NamedTuple):
    """Numbers in a line, or several: a name, the tokens, colours of the asked and of the sources, answers below."""

    name: str
    tokens: list[int]
    full: dict[int, str]
    pale: dict[int, str]
    below: dict[int, str]


class Cell(NamedTuple):
    """A token in a picture of text: its letters, the colour behind it, and what is written below."""

    text: str
    colour: str | None = None
    below: str = ""


def reads(task: Task, segment: Batch) -> bool:
    """Whether the tokens of a task can be read as text."""
    return not segment.inputs.is_floating_point() and task.spelled(segment.inputs[0, :1].long()) is not None


def answer(task: Task, target: int) -> str:
    """A class by its name."""
    classes = getattr(task, "classes", None)
    return str(target) if classes is None else str(classes[target])


# -- numbers --------------------------------------------------------------------------------------


def strips(row: str, task: Task, segment: Batch, rows: Sequence[int]) -> Figure:
    """Sequences as strips of cells: an asked one is filled, its answer beneath, and where it can be read is tinted."""
    single = isinstance(task.spec.output, PerSequence)
    drawn: list[_Strip] = []
    caption = "numbers are token ids"
    for r in rows:
        tokens, context = _real(segment.inputs, segment.key_mask, r).tolist(), _context(segment, r)
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
    ax = _canvas(figure, room, height)
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


# -- texts ----------------------------------------------------------------------------------------


def texts(row: str, task: Task, segment: Batch, rows: Sequence[int]) -> Figure:
    """Sequences that can be read: their class in front, or what is asked of them marked; pairs side by side."""
    single = isinstance(task.spec.output, PerSequence)
    names = [answer(task, int(segment.targets[r, 0])) if single else "" for r in rows]
    gutter = max(map(len, names)) + 3 if single else 0
    width = WIDTH - gutter if segment.context is None else (WIDTH - gutter) // 2 - 1
    blocks: list[list[list[list[Cell]]]] = []
    for r in rows:
        sides = [_real(segment.inputs, segment.key_mask, r)]
        if segment.context is not None:
            sides.append(_real(segment.context, segment.context_mask, r))
        blocks.append([_lines(_cells(task, segment, r, _spelled(task, side)), width, single) for side in sides])
    below = any(cell.below for columns in blocks for lines in columns for line in lines for cell in line)
    step = 2.1 if below else 1.15
    heights = [step * max(map(len, columns)) + 0.6 for columns in blocks]
    figure = f.new(
        LETTER * WIDTH + 0.3, LINE * sum(heights) + 0.75, _legend(segment, single), f"{row}: examples of test"
    )
    ax = _canvas(figure, WIDTH, sum(heights))
    y = 0.2
    for name, columns, height in zip(names, blocks, heights, strict=True):
        ax.text(0, y + 0.5, name, va="center", fontsize=7, fontweight="bold", color=f.PALETTE[1])
        for side, lines in enumerate(columns):
            for number, line in enumerate(lines):
                _write(ax, gutter + side * (width + 2), y + step * number, line)
        y += height
    return figure


def _legend(segment: Batch, single: bool) -> str:
    if single:
        return "in front: the class; …: there is more, or a word that is not among the known ones"
    if "recall" in segment.slices:
        return (
            "every token is predicted from those before it; marked: AR hits, tokens that the window has shown behind "
            "the same n-gram before, and train seldom or never; ↵ ends a line"
        )
    return "coloured: hidden tokens, what is due below them; orange: masked, pink: another token, green: kept as it was"


def _spelled(task: Task, tokens: Any) -> list[str]:
    words = [text.replace("\n", "↵") for text in task.spelled(tokens.long()) or []]
    return ["".join(letter if letter.isprintable() else "·" for letter in word) for word in words]


def _cells(task: Task, segment: Batch, row: int, words: list[str]) -> list[Cell]:
    """Tokens of a text with what is asked: AR hits tinted, hidden ones with their answer below."""
    if isinstance(task.spec.output, PerSequence):
        return [Cell(word) for word in words]
    targets = _spelled(task, segment.targets[row].clamp_min(0))
    if "recall" in segment.slices:  # the target of a position is the next token
        hits = segment.slices["recall"][row].tolist()
        return [Cell(words[0]), *(Cell(w, f.PALETTE[4] if hit else None) for w, hit in zip(targets, hits, strict=True))]
    cells = [Cell(word) for word in words]
    kinds = segment.slices["class"][row].tolist() if "class" in segment.slices else [0] * len(targets)
    shades = list(SHADES.values())
    for position, target, kind in zip(segment.positions[row].tolist(), targets, kinds, strict=True):
        cells[position] = Cell(words[position], shades[kind], target.strip() or target)
    return cells


def _lines(cells: list[Cell], width: int, single: bool) -> list[list[Cell]]:
    """Lines of at most `width` letters; of one text with a class, broken at spaces as far as there are any."""
    lines: list[list[Cell]] = [[]]
    used = 0
    for cell in cells:
        size = max(len(cell.text), len(cell.below))
        if used + size > width:
            rest: list[Cell] = []
            if single:
                while lines[-1] and lines[-1][-1].text[:1] != " " and cell.text[:1] != " ":
                    rest.insert(0, lines[-1].pop())
                if not lines[-1]:
                    lines[-1], rest = rest, []
            lines.append(rest)
            used = sum(len(kept.text) for kept in rest)
        if single and not lines[-1] and cell.text == " ":
            continue
        lines[-1].append(cell)
        used += size
    if len(lines) > LONGEST:
        lines = lines[:LONGEST]
        lines[-1][-1] = Cell(" …")
    return lines


def _write(ax: Axes, x: float, y: float, line: list[Cell]) -> None:
    """A line of text, letter by letter, so that every letter has its place on every machine."""
    style: dict[str, Any] = {"fontsize": 7, "family": "DejaVu Sans Mono", "ha": "center", "va": "center"}
    for cell in line:
        size = max(len(cell.text), len(cell.below))
        if cell.colour:
            ax.add_patch(Rectangle((x, y), size, 0.98, color=cell.colour, alpha=0.4, lw=0))
        for i, letter in enumerate(cell.text):
            if letter != " ":
                ax.text(x + i + 0.5, y + 0.5, letter, **style)
        for i, letter in enumerate(cell.below):
            ax.text(x + i + 0.5, y + 1.42, letter, color=cell.colour, fontweight="bold", **style)
        x += size


def _real(tokens: Any, mask: Any, row: int) -> Any:
    """One sequence without padding."""
    return tokens[row] if mask is None else tokens[row][mask[row].bool()]


def _context(segment: Batch, row: int) -> list[int]:
    return [] if segment.context is None else _real(segment.context, segment.context_mask, row).tolist()


def _canvas(figure: Figure, width: float, height: float) -> Axes:
    """Axes without a frame, one unit per letter or cell, y downwards."""
    ax = figure.add_subplot()
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.axis("off")
    return ax
