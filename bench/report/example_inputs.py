"""Pictures of example inputs of a task: images, series, windows; tokens stand in `example_strips` and `_texts`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from bench.report import example_strips, example_texts
from bench.report import figure as f
from bench.report.example_tokens import answer, reads
from tasks.base import IGNORE, Batch, PerSequence, Task, Tokens, Values

NUMBER = 6  # examples in a picture, where one is small
SHOWN = 80  # moments of a long series


@dataclass(frozen=True)
class Examples:
    """What is drawn: a row of conf/task, and the segment that examples are taken from."""

    row: str
    task: Task
    segment: Batch


def picture(row: str, task: Task, segments: Sequence[Batch]) -> bytes | None:
    """The PNG of a few examples, those of the shortest segment; None: nobody knows how to draw them."""
    shortest = min(segments, key=lambda segment: segment.inputs.shape[1])
    if isinstance(task.spec.output, PerSequence) or task.spec.grid is not None:
        shortest = segments[0]
    windows = [segment for segment in segments if segment.slices]  # of language modeling: those with AR hits marked
    if reads(task, segments[0]) and windows:
        shortest = windows[0]
    png = f.render(_draw, Examples(row, task, shortest))
    return None if png is None else small(png)


def small(png: bytes) -> bytes:
    """The picture in 64 colours of its own, a third of the bytes."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def _draw(shown: Examples) -> Figure | None:
    spec = shown.task.spec
    if spec.grid is not None:
        return _images(shown)
    if isinstance(spec.output, Values):
        return _forecasts(shown)
    if isinstance(spec.inputs, Tokens):
        rows = _chosen(shown, 4 if spec.context is not None else NUMBER)
        if reads(shown.task, shown.segment):
            return example_texts.texts(shown.row, shown.task, shown.segment, rows[: None if _single(shown) else 3])
        return example_strips.strips(shown.row, shown.task, shown.segment, rows[:4])
    return _series(shown) if _single(shown) else _vectors(shown)


def _single(shown: Examples) -> bool:
    return isinstance(shown.task.spec.output, PerSequence)


def _chosen(shown: Examples, number: int) -> list[int]:
    """Rows to draw: the first of each class by turns, else the first ones, of texts those with AR hits."""
    segment = shown.segment
    if not _single(shown):
        if "recall" not in segment.slices:
            return list(range(min(number, len(segment))))
        hits = segment.slices["recall"].long().sum(1).clamp_max(number)
        return sorted(torch.sort(hits, descending=True, stable=True).indices[:3].tolist())
    labels = segment.targets[:, 0].tolist()
    turns = [[row for row, label in enumerate(labels) if label == wanted][:number] for wanted in sorted(set(labels))]
    rows = [turn[i] for i in range(number) for turn in turns if i < len(turn)]
    return sorted(rows[:number], key=lambda row: (labels[row], row))


def _images(shown: Examples) -> Figure:
    """Sequences that are images, as images."""
    rows = _chosen(shown, NUMBER)
    caption = f"one position per square, read row by row: {shown.segment.inputs.shape[1]} positions"
    figure = f.new(7.2, 1.95, caption, f"{shown.row}: examples of test with their class")
    grid = shown.task.spec.grid
    assert grid is not None
    images = [_image(shown.segment.inputs[row], grid) for row in rows]
    low, high = min(image.min() for image in images), max(image.max() for image in images)
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    for ax, row, image in zip(axes, rows, images, strict=True):
        ax.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="none")
        ax.set_title(answer(shown.task, int(shown.segment.targets[row, 0])))
        step = image.shape[0] // grid[0]
        if step > 1:  # patches
            for edge in np.arange(step, image.shape[0], step) - 0.5:
                ax.axhline(edge, color=f.PALETTE[4], lw=0.4)
                ax.axvline(edge, color=f.PALETTE[4], lw=0.4)
        _bare(ax)
    return figure


def _image(sequence: torch.Tensor, grid: tuple[int, ...]) -> np.ndarray:
    """Pixels [rows, columns] of a sequence [L] or [L, patch * patch]."""
    values = sequence.float().numpy().reshape(*grid, -1)
    patch = math.isqrt(values.shape[-1])
    return values.reshape(*grid, patch, patch).swapaxes(1, 2).reshape(grid[0] * patch, grid[1] * patch)


def _series(shown: Examples) -> Figure:
    """Measurements over time, a line for each channel."""
    rows = _chosen(shown, NUMBER)
    patch = getattr(shown.task, "patch", 1)
    dim = shown.segment.inputs.shape[2]
    words = f"{dim // patch} channels" if dim > patch else "one channel"
    dense = shown.segment.inputs.shape[1] * patch > 12 * SHOWN and patch > 1
    words += f", the first {SHOWN} moments" if dense else ""
    cut = f"; a position is {patch} moments in a row" if patch > 1 else ""
    figure = f.new(7.2, 3.2, f"{words}, in standard deviations of train{cut}", f"{shown.row}: examples of test")
    axes = figure.subplots(2, math.ceil(len(rows) / 2), squeeze=False, sharex=True).ravel()
    for ax in axes[len(rows) :]:
        ax.set_visible(False)
    for ax, row in zip(axes, rows, strict=False):
        values = shown.segment.inputs[row]
        if shown.segment.key_mask is not None:
            values = values[shown.segment.key_mask[row].bool()]
        lines = values.float().numpy().reshape(len(values) * patch, -1)
        while patch > 1 and not lines[-1].any():  # the last patch is filled up
            lines = lines[:-1]
        lines = lines[:SHOWN] if dense else lines
        for channel, line in enumerate(lines.T):
            ax.plot(line, color=f.PALETTE[channel % len(f.PALETTE)], lw=0.7, alpha=0.9)
        ax.set_title(f"class {answer(shown.task, int(shown.segment.targets[row, 0]))}", loc="left")
        ax.margins(x=0.01)
        ax.tick_params(labelsize=6)
    for ax in axes[max(0, len(rows) - math.ceil(len(rows) / 2)) : len(rows)]:
        ax.set_xlabel("moment", fontsize=7)
    return figure


def _forecasts(shown: Examples) -> Figure:
    """What is known, and what is to be told."""
    segment, task = shown.segment, shown.task
    rows = np.linspace(0, len(segment) - 1, 6).astype(int)[1:-1]
    columns = list(getattr(task, "targets", range(segment.targets.shape[2])))
    past = segment.inputs if segment.context is None else segment.context
    length = past.shape[1] if segment.context is not None else int(segment.positions[0, 0])
    names = list(getattr(task, "variables", map(str, range(len(columns)))))
    caption = "standard deviations of train; the dotted line is the moment of the forecast"
    figure = f.new(7.2, 3.4, caption, f"{shown.row}: windows of test; thin: known, thick: to be predicted")
    axes = figure.subplots(2, 2, squeeze=False, sharex=True).ravel()
    for ax, row in zip(axes, rows, strict=True):
        for place, column in enumerate(columns[:3]):
            colour = f.PALETTE[place]
            known, wanted = past[row, :length, column].numpy(), segment.targets[row, :, place].numpy()
            ax.plot(np.arange(-length, 0), known, color=colour, lw=0.8, label=names[place])
            ax.plot(np.arange(len(wanted)), wanted, color=colour, lw=2.4, alpha=0.7)
        ax.axvline(-0.5, color=f.GREY, lw=0.8, ls=":")
        ax.margins(x=0.01)
    for ax in axes[2:]:
        ax.set_xlabel("step")
    if len(names) > 1:
        axes[0].legend(fontsize=6, frameon=False, loc="upper left")
    return figure


def _vectors(shown: Examples) -> Figure:
    """Vectors with an answer at some of the positions: one column each."""
    rows = range(min(3, len(shown.segment)))
    caption = "a column is one position, its numbers from top to bottom; below: the class that is due there"
    length = shown.segment.inputs.shape[1]
    figure = f.new(7.2, 2.6, caption, f"{shown.row}: examples of test")
    axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for ax, row in zip(axes, rows, strict=True):
        values = shown.segment.inputs[row].float().numpy().T
        edge = float(np.abs(values).max())
        ax.imshow(values, cmap="PuOr", vmin=-edge, vmax=edge, aspect="auto", interpolation="none")
        asked = shown.segment.targets[row] != IGNORE
        places = shown.segment.positions[row][asked].tolist()
        due = shown.segment.targets[row][asked].tolist()
        ax.set_xticks(places, [str(target) for target in due], color=f.PALETTE[1], fontweight="bold", fontsize=7)
        ax.set_xlim(-0.5, length - 0.5)
        ax.set_yticks([])
        ax.grid(visible=False)
    return figure


def _bare(ax: Any) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
