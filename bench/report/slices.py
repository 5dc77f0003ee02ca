"""Slices of the test scores by kind: what each key means, how its values are ordered, in which picture it stands.

A task records slices under keys of its choice. Keys in KINDS have a label; any other is drawn all the same, as curves
when its values are numbers or ranges of numbers, as a heat map otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.report.leaderboard import Board, slice_order

SEGMENTS, DISTANCES, HEAT, CURVES = "segments.png", "distance_order.png", "slices.png", "curves.png"
CONFUSION, TRACE, PAST = "confusion", "trace", "_past"  # trace0, trace1, ...; trace0_past is what came before


class Kind(NamedTuple):
    """What a key of slices means.

    Args:
        label: of its axis.
        picture: file that it is drawn in.
        table: most values that the page repeats as a table; 0: none.
    """

    label: str
    picture: str
    table: float = 12


KINDS = {
    "segment": Kind("length × pairs", SEGMENTS, table=math.inf),
    "distance": Kind("distance to the key (tokens)", DISTANCES, table=0),
    "order": Kind("order", DISTANCES, table=0),
    **{key: Kind(key, HEAT) for key in ("class", "operator", "level", "depth", "setting", "digit", "variable")},
    "pairs": Kind("number of pairs", HEAT),
    "disc_distance": Kind("distance of the two discs (pixels)", HEAT),
    "position": Kind("position", CURVES, table=0),
    "since": Kind("positions since the last occurrence", CURVES, table=0),
    "horizon": Kind("steps ahead", CURVES, table=0),
    "length": Kind("length", CURVES, table=0),
    "short": Kind("length of the short list", CURVES, table=0),
    "kinds": Kind("kinds of the two questions", HEAT, table=0),
}
SEGMENTED = "length", "pairs"  # not shown beside segments, which are the two crossed
# one number, or a range by its ends: 8, 8-15, 64+, >=64, -3
NUMBER = re.compile(r"[<>=≤≥]{0,2}(-?\d+(?:\.\d+)?)(?:[-–](-?\d+(?:\.\d+)?))?\+?")


def kinds(slices: pd.DataFrame) -> dict[str, Kind]:
    """Kind of every key in `slices` (of a board): the known in the order of KINDS, the others by name behind them.

    A key with one value (the one variable of a forecast) says nothing that the whole split does not.
    """
    counts = slices.groupby("slice_key")["slice_value"].nunique()
    keys = set(counts.index[(counts > 1) | (counts.index == "segment")])
    found = {key: kind for key, kind in KINDS.items() if key in keys}
    for key in sorted(keys - set(found)):
        numeric = all(ends(value) for value in slices.loc[slices["slice_key"] == key, "slice_value"])
        label = key.replace("_", " ")
        found[key] = Kind(label, CURVES, table=0) if numeric else Kind(label, HEAT)
    return {key: kind for key, kind in found.items() if "segment" not in found or key not in SEGMENTED}


def values(slices: pd.DataFrame, key: str) -> list[str]:
    """The values of a kind, in order."""
    return sorted(slices.loc[slices["slice_key"] == key, "slice_value"].unique(), key=slice_order)


def shown(value: str) -> str:
    """A value as a reader sees it: 64×4 for 64x4."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", value)


def ends(value: str) -> tuple[float, float] | None:
    """Both ends of a number or a range of numbers; None for a word."""
    found = NUMBER.fullmatch(value.strip())
    return None if found is None else (float(found[1]), float(found[2] or found[1]))


class Scale(NamedTuple):
    """Where the values of a numeric kind stand on an axis.

    Args:
        x: value -> place; the lower end of a range on a logarithmic axis, its middle otherwise. A word (such as
            "never") has a place of its own behind the numbers.
        logarithmic: the numbers are powers of two, but perhaps for the largest, with or without 0, which then stands at
            half the smallest.
        words: values that are no numbers.
    """

    x: dict[str, float]
    logarithmic: bool
    words: list[str]


def scale(names: Collection[str]) -> Scale:
    """The axis of a numeric kind, for values as the tasks name them."""
    known = {name: found for name in names if (found := ends(name))}
    words = sorted(set(names) - set(known))
    low = sorted(start for start, _ in known.values())
    positive = [start for start in low if start > 0]
    logarithmic = (
        len(positive) > 2
        and len(low) - len(positive) == low.count(0)
        and all(math.log2(start).is_integer() for start in positive[:-1])
        and positive[-1] >= 4 * positive[0]
    )
    if logarithmic:
        x = {name: start or positive[0] / 2 for name, (start, _) in known.items()}
    else:
        x = {name: (start + stop) / 2 for name, (start, stop) in known.items()}
    last, step = (max(x.values()), max(x.values()) - min(x.values())) if x else (0.0, 1.0)
    for i, name in enumerate(words, 1):
        x[name] = last * 4.0**i if logarithmic else last + 0.12 * i * (step or 1)
    return Scale(dict(sorted(x.items(), key=lambda item: item[1])), logarithmic, words)


def confusion(board: Board, attention: str) -> tuple[list[str], np.ndarray] | None:
    """Classes and share of predictions [true, predicted] of a mechanism on test, rows adding up to 1.

    Mean over seeds at the chosen rate; a pair that a run did not record did not occur in it. A class without examples
    has a row of NaN. None when nothing was recorded.
    """
    part = _recorded(board, lambda key: key == CONFUSION, attention)
    pairs = part["slice_value"].str.split(">", n=1, expand=True)
    part = part[part["slice_value"].str.contains(">", regex=False)].assign(true=pairs.get(0), predicted=pairs.get(1))
    if part.empty:
        return None
    every = _recorded(board, lambda key: key == CONFUSION)["slice_value"].str.split(">", n=1)
    classes = sorted({name for pair in every for name in pair}, key=slice_order)
    place = {name: i for i, name in enumerate(classes)}
    matrices = []
    for _, own in part.groupby("run_id"):
        matrix = np.zeros((len(classes), len(classes)))
        np.add.at(matrix, (own["true"].map(place).to_numpy(), own["predicted"].map(place).to_numpy()), own["value"])
        matrices.append(matrix)
    mean = np.mean(matrices, axis=0)
    total = mean.sum(1, keepdims=True)
    return classes, np.divide(mean, total, out=np.full_like(mean, np.nan), where=total > 0)


class Trace(NamedTuple):
    """One forecast example: series of (steps, values), by mechanism where they are forecasts."""

    past: tuple[np.ndarray, np.ndarray]  # the look-back, ends one step before the target; empty where not recorded
    target: tuple[np.ndarray, np.ndarray]
    forecasts: dict[str, tuple[np.ndarray, np.ndarray]]
    minutes: float | None  # that a step takes; None where not recorded


def traces(board: Board, names: Collection[str]) -> list[Trace]:
    """The forecast examples of a board with what these mechanisms predict, all at the first seed of the first of them.

    One seed: an average of forecasts is not what any model predicts, and examples may differ between seeds.
    """
    every = _recorded(board, lambda key: key.startswith(TRACE))
    every = every[every["attention"].isin(list(names))]
    found = []
    for key in sorted((k for k in every["slice_key"].unique() if not k.endswith(PAST)), key=slice_order):
        own = every[every["slice_key"] == key]
        first = next(name for name in names if name in set(own["attention"]))
        seed = own.loc[own["attention"] == first, "seed"].min()
        at = every[every["seed"] == seed]
        one = at[at["attention"] == first]
        target = _series(one[(one["slice_key"] == key) & (one["metric"] == "target")])
        forecast = at[(at["slice_key"] == key) & (at["metric"] == "forecast")]
        forecasts = {name: _series(forecast[forecast["attention"] == name]) for name in names}
        forecasts = {name: series for name, series in forecasts.items() if len(series[0])}
        if len(target[0]) and forecasts:
            steps, past = _series(one[one["slice_key"] == key + PAST])
            if len(steps):
                steps = steps - steps[-1] + target[0][0] - 1
            _, minutes = _series(one[(one["slice_key"] == key) & (one["metric"] == "minutes")])
            found.append(Trace((steps, past), target, forecasts, minutes[0] if len(minutes) else None))
    return found


def _recorded(board: Board, wanted: Callable[[str], bool], attention: str | None = None) -> pd.DataFrame:
    """Scores of some slices on test, of the runs that a board's numbers come from, with their mechanism and seed."""
    runs = board.runs.loc[board.runs["chosen"] & board.runs["good"], ["run_id", "attention", "seed"]]
    runs = runs if attention is None else runs[runs["attention"] == attention]
    scores = board.frames.scores
    return scores[(scores["split"] == "test") & scores["slice_key"].map(wanted).astype(bool)].merge(runs, on="run_id")


def _series(scores: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a trace, in order of the steps."""
    steps = scores["slice_value"].astype(float).to_numpy()
    index = np.argsort(steps, kind="stable")
    return steps[index], scores["value"].to_numpy(float)[index]
