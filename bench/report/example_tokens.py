"""What pictures of token sequences share."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.base import Batch, Task


def reads(task: Task, segment: Batch) -> bool:
    """Whether the tokens of a task can be read as text."""
    return not segment.inputs.is_floating_point() and task.spelled(segment.inputs[0, :1].long()) is not None


def answer(task: Task, target: int) -> str:
    """A class by its name."""
    classes = getattr(task, "classes", None)
    return str(target) if classes is None else str(classes[target])


def real(tokens: Any, mask: Any, row: int) -> Any:
    """One sequence without padding."""
    return tokens[row] if mask is None else tokens[row][mask[row].bool()]


def context_of(segment: Batch, row: int) -> list[int]:
    """The second sequence of an example; empty if there is none."""
    return [] if segment.context is None else real(segment.context, segment.context_mask, row).tolist()


def canvas(figure: Figure, width: float, height: float) -> Axes:
    """Axes without a frame, one unit per letter or cell, y downwards."""
    ax = figure.add_subplot()
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.axis("off")
    return ax
