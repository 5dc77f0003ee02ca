"""Pictures of sequences that can be read, with their class or with what is asked of them marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench.report import figure as f
from bench.report.example_tokens import answer, canvas, real
from tasks.base import Batch, PerSequence, Task

LETTER, LINE = 0.062, 0.15  # inches of a letter and of a line
WIDTH = 112  # letters of a line
LONGEST = 3  # lines of one text
SHADES = f.PALETTE[1], f.PALETTE[3], f.PALETTE[2]  # masked, random, kept


class Cell(NamedTuple):
    """A token in a picture of text: its letters, the colour behind it, and what is written below."""

    text: str
    colour: str | None = None
    below: str = ""


def texts(row: str, task: Task, segment: Batch, rows: Sequence[int]) -> Figure:
    """Sequences that can be read: their class in front, or what is asked of them marked; pairs side by side."""
    single = isinstance(task.spec.output, PerSequence)
    names = [answer(task, int(segment.targets[r, 0])) if single else "" for r in rows]
    gutter = max(map(len, names)) + 3 if single else 0
    width = WIDTH - gutter if segment.context is None else (WIDTH - gutter) // 2 - 1
    blocks: list[list[list[list[Cell]]]] = []
    for r in rows:
        sides = [real(segment.inputs, segment.key_mask, r)]
        if segment.context is not None:
            sides.append(real(segment.context, segment.context_mask, r))
        blocks.append([_lines(_cells(task, segment, r, _spelled(task, side)), width, single) for side in sides])
    below = any(cell.below for columns in blocks for lines in columns for line in lines for cell in line)
    step = 2.1 if below else 1.15
    heights = [step * max(map(len, columns)) + 0.6 for columns in blocks]
    figure = f.new(
        LETTER * WIDTH + 0.3, LINE * sum(heights) + 0.75, _legend(segment, single), f"{row}: examples of test"
    )
    ax = canvas(figure, WIDTH, sum(heights))
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
    for position, target, kind in zip(segment.positions[row].tolist(), targets, kinds, strict=True):
        cells[position] = Cell(words[position], SHADES[kind], target.strip() or target)
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
