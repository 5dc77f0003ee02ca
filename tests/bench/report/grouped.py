"""Boards of one group: the four patterns of one task, mechanisms that lack some of them, and a failed seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from synthetic import frames, run

from bench.report.composite import PATTERNS
from bench.report.frames import Frames

LACKS = {
    "short_conv": ("noncausal cross", "causal cross"),
    "gla": ("noncausal cross", "causal cross"),
    "sliding_window(window=32)": ("noncausal cross", "causal cross"),
    "delta_net": ("noncausal self", "noncausal cross", "causal cross"),
    "nystrom": PATTERNS,
}
RATE = 0.01
NAMES = "softmax", "uniform", "none", "linear", *LACKS


def joined(*several: Frames) -> Frames:
    return Frames(*(pd.concat([getattr(f, name) for f in several]) for name in ("runs", "scores", "history")))


def reason(name: str, pattern: str) -> str:
    return f"{name} is not defined for {pattern} attention"


def board(
    pattern: str | None,
    task: str,
    names: Sequence[str] = NAMES,
    lacks: Mapping[str, Sequence[str]] = LACKS,
    group: str | None = "patterns",
    shift: float = 0.0,
    fail: Sequence[str] = (),
    **changes: object,
) -> Frames:
    """One board; `shift` is taken off every score, but for the floors."""
    own = [name for name in names if pattern not in lacks.get(name, ())]
    facts = dict(task=task, task_id=f"recall/{task}", task_group=group, pattern=pattern, **changes)
    data = frames(own, rates=[RATE], trouble=False, fail=fail, **facts)
    attention = data.scores["run_id"].map(data.runs.set_index("run_id")["attention"])
    data.scores.loc[~attention.isin(["none", "uniform"]), "value"] -= shift
    without = [
        run(name, RATE, seed, "unsupported", reason(name, str(pattern)), **facts)
        for name in names
        if name not in own
        for seed in (0, 1, 2)
    ]
    return joined(data, Frames.from_rows(without, [], []))


def patterns(**changes: object) -> Frames:
    """Four boards; linear loses a seed in causal cross."""
    several = [
        board(pattern, f"recall_{pattern.replace(' ', '_')}", shift=0.07 * i, **changes)
        for i, pattern in enumerate(PATTERNS)
    ]
    data = joined(*several)
    runs = data.runs.reset_index(drop=True)
    lost = (runs["attention"] == "linear") & (runs["pattern"] == "causal cross") & (runs["seed"] == 2)
    runs.loc[lost, ["status", "reason"]] = ["nan", "loss is nan at step 37"]
    return Frames(runs, data.scores.reset_index(drop=True), data.history.reset_index(drop=True))
