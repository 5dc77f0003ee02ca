"""Boards of tasks that record other slices and units: a language model, ListOps, digits, a forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from synthetic import run

from bench.report import markdown
from bench.report.frames import Frames
from bench.report.leaderboard import Board

NAMES = (
    *("softmax", "based_hybrid", "gated_delta_net", "delta_net", "based", "retention", "linear"),
    *("uniform", "short_conv", "none"),
)
Slices = Callable[[str, float, int], list[tuple[str, float, str, str]]]
SINCE = ("1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "never")
POSITIONS = [f"{first}-{first + 15}" for first in range(0, 256, 16)]
OPERATORS = "MAX", "MED", "MIN", "SM"
SOLVERS = {"majority": 0.172, "root operator": 0.362}


def board(
    values: Sequence[float],
    slices: Slices,
    metric: str,
    unit: str,
    higher: bool,
    *,
    names: Sequence[str] = NAMES,
    seeds: Sequence[int] = (0, 1, 2),
    noise: float = 0.01,
    floors: dict[str, float] | None = None,
    start: float | None = None,
    **facts: Any,
) -> Frames:
    """One board at one learning rate.

    Args:
        values: score of each mechanism, before noise over seeds.
        slices: (name, value, seed) -> (metric, value, slice_key, slice_value).
        start: value of `valid` before training; the score itself if None.
    """
    runs, scores, history = [], [], []
    for name, value in zip(names, values, strict=True):
        for seed in seeds:
            measure = dict(metric=metric, metric_unit=unit, higher_is_better=higher)
            row = run(name, 0.01, seed, "ok", "", **{**measure, **facts})
            runs.append(row)
            own = value * (1 + noise * float(np.random.default_rng([seed, len(name)]).normal()))
            parts = [(metric, own, "all", ""), ("loss", 0.7 * own, "all", ""), *slices(name, own, seed)]
            parts += [(metric, level + 0.001 * seed, "floor", solver) for solver, level in (floors or {}).items()]
            scores += [
                dict(zip(("metric", "value", "slice_key", "slice_value"), part, strict=True))
                | dict(run_id=row["run_id"], split=split, count=100)
                for part in parts
                for split in (("valid", "test") if part[2] == "all" else ("test",))
            ]
            first = own if start is None else start
            for step in range(50, 501, 50):
                at = own + (first - own) * np.exp(-step / 120)
                part = dict(train_loss=0.7 * at, auxiliary_loss=0.0, valid_loss=0.7 * at, valid_metric=at)
                history.append(dict(run_id=row["run_id"], step=step, learning_rate=0.01, seconds=step * 0.1) | part)
    return Frames.from_rows(runs, scores, history)


def language(**changes: Any) -> Frames:
    """Bits per byte by position and by distance to the last occurrence; a unigram and chance far above."""

    def slices(name: str, value: float, seed: int) -> list[tuple[str, float, str, str]]:
        memory = {"none": 0.02, "short_conv": 0.1, "uniform": 0.15}.get(name, 0.8)
        rows = [("bits_per_byte", value * (1 + memory / (1 + i)), "position", v) for i, v in enumerate(POSITIONS)]
        steep = 0.04 if name == "softmax" else 0.09
        return rows + [("bits_per_byte", value * (0.7 + steep * i), "since", v) for i, v in enumerate(SINCE)]

    values = 2.05, 2.07, 2.11, 2.18, 2.22, 2.31, 2.4, 2.9, 2.75, 3.3
    facts: dict[str, Any] = dict(
        task="bytes", task_id="bytes/wiki", chance=8.0, floors={"unigram": 4.9, "bigram": 3.4}, start=7.5
    )
    kind = dict(values=values, slices=slices, metric="bits_per_byte", unit="bits per byte", higher=False)
    return board(**{**kind, **facts, **changes})


def listops(**changes: Any) -> Frames:
    """Accuracy by operator of the root and by depth; the two plateaus are floors."""

    def slices(name: str, value: float, seed: int) -> list[tuple[str, float, str, str]]:
        ease = dict(zip(OPERATORS, (1.3, 0.7, 1.25, 0.6), strict=True))
        rows = [("accuracy", min(1.0, value * ease[v]), "operator", v) for v in OPERATORS]
        rows += [("accuracy", value * (1.2 - 0.05 * i), "depth", str(i)) for i in range(2, 11)]
        return rows + [
            ("accuracy", value * (1.1 - 0.05 * i), "length", f"{501 + 375 * i}-{875 + 375 * i}") for i in range(4)
        ]

    values = 0.52, 0.47, 0.41, 0.39, 0.365, 0.36, 0.34, 0.31, 0.355, 0.17
    facts: dict[str, Any] = dict(task="listops", task_id="listops/fixed", chance=0.1, floors=SOLVERS, start=0.1)
    kind = dict(values=values, slices=slices, metric="accuracy", unit="fraction", higher=True)
    return board(**{**kind, **facts, **changes})


def digits(classes: int = 10, **changes: Any) -> Frames:
    """Accuracy by digit with confusions: 4 and 9 are mistaken for each other, what did not occur is not recorded."""

    def slices(name: str, value: float, seed: int) -> list[tuple[str, float, str, str]]:
        rows = [("accuracy", value, "digit", str(i)) for i in range(classes)]
        for i in range(classes):
            other = {4: 9, 9: 4}.get(i, (i + 1 + seed) % classes)
            rows += [("share", value, "confusion", f"{i}>{i}"), ("share", 1 - value, "confusion", f"{i}>{other}")]
        return rows

    values = 0.92, 0.96, 0.93, 0.92, 0.91, 0.9, 0.88, 0.7, 0.8, 0.94
    facts: dict[str, Any] = dict(task="digits", task_id="digits/pixels", chance=0.1)
    kind = dict(values=values, slices=slices, metric="accuracy", unit="fraction", higher=True)
    return board(**{**kind, **facts, **changes})


def forecast(**changes: Any) -> Frames:
    """Mean squared error by step ahead and by variable, with two traces, the first with its look-back; no chance."""

    def slices(name: str, value: float, seed: int) -> list[tuple[str, float, str, str]]:
        rows = [("mse", value * (0.5 + i / 24), "horizon", str(i + 1)) for i in range(24)]
        rows += [("mse", value * (1 + i), "variable", v) for i, v in enumerate(("HUFL", "HULL", "OT"))]
        for trace in (0, 1):
            wave = np.sin((np.arange(-48, 24) + 7 * trace) / 4 + seed)
            rows += [("target", wave[48 + i], f"trace{trace}", str(i)) for i in range(24)]
            rows += [("forecast", wave[48 + i] * (1 - value * i / 24), f"trace{trace}", str(i)) for i in range(24)]
            rows += [("target", wave[i], "trace0_past", str(i)) for i in range(48) if trace == 0]
            rows += [("minutes", 30.0, "trace0", "1") for _ in range(trace == 0)]
        return [(metric, float(number), key, v) for metric, number, key, v in rows]

    values = 0.31, 0.33, 0.35, 0.38, 0.42, 0.47, 0.55, 0.9, 0.8, 21.0
    facts: dict[str, Any] = dict(
        task="ett", task_id="ett/h1", chance=float("nan"), floors={"last value": 0.49, "mean": 1.02}
    )
    kind = dict(values=values, slices=slices, metric="mse", unit="", higher=False)
    return board(**{**kind, **facts, **changes})


def joined(*several: Frames) -> Frames:
    """Several boards in one set of frames."""
    return Frames(*(pd.concat([getattr(f, name) for f in several]) for name in ("runs", "scores", "history")))


ALL = {"language": language, "listops": listops, "digits": digits, "forecast": forecast}


def lines_of(ax: Axes) -> dict[tuple[Any, Any], Any]:
    """Curves of an axis by colour and marker, one for each look."""
    return {(line.get_color(), line.get_marker()): line for line in ax.lines if line.get_linestyle() != "None"}


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def ranking(board: Board) -> tuple[list[str], dict[str, list[str]]]:
    """Header and lines of a page's table, these by mechanism."""
    header, lines = markdown.ranking(board)
    return header, {line[1]: line for line in lines}
