"""The pages of MAD's score: one for each protocol, backbone and budget, over the boards of its skills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report import files, wording
from bench.report.leaderboard import Board, safe
from bench.report.mad_score import KEY, mad_runs, mad_scores
from bench.report.markdown import escape, table
from bench.report.statistics import LEVEL

OWN = ["mad.md", "mad.csv"]
WORDS = (
    "score: the mean over skills, and within a skill over the settings below, of the accuracy on test at the learning "
    f"rate that the setting's own board has chosen on valid, with its interval at {LEVEL:.0%} over seeds. Settings "
    "that a mechanism has no result for are left out of its mean and counted, so compare rows with equal counts only. "
    "Each setting's column is that accuracy, mean over seeds; failed seeds are not in it, and the boards say which."
)
AHEAD = "looks ahead, not ranked: "


def pages(boards: Sequence[Board], defaults: Mapping[str, str]) -> dict[str, dict[str, bytes]]:
    """Folder -> file name -> bytes, for every protocol, backbone and budget that boards of MAD's skills have."""
    runs = mad_runs(boards)
    scores = mad_scores(runs)
    made = {}
    for key, own in scores.groupby(KEY, sort=True):
        protocol, backbone, budget = map(str, key)
        others = [name for name, part in (("backbone", backbone), ("budget", budget)) if part != defaults[name]]
        parts = ["mad", protocol, *({"backbone": backbone, "budget": budget}[name] for name in others)]
        here = runs[(runs[KEY] == list(key)).all(axis=1)]
        made["-".join(map(safe, parts))] = {
            "mad.md": _page(f"MAD score · {protocol} · {backbone} · {budget}", own, here).encode(),
            "mad.csv": files.csv(_wide(own, here)),
        }
    return made


def _wide(scores: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One row per mechanism: its score, and the accuracy in every setting."""
    best = runs[(runs["chosen"] & runs["good"]).astype(bool)]
    settings = best.pivot_table(index="attention", columns="setting", values="test")
    return scores.drop(columns=KEY).join(settings, on="attention")


def _page(title: str, scores: pd.DataFrame, runs: pd.DataFrame) -> str:
    wide = _wide(scores, runs)
    settings = [str(name) for name in wide.columns[len(scores.columns) - len(KEY) :]]
    lines = [
        [
            row["attention"],
            _score(row),
            f"{row['settings']} of {row['settings_all']}",
            *(wording.number(row[name]) for name in settings),
        ]
        for row in wide.to_dict("records")
    ]
    header = ["attention", "score", "settings", *settings]
    ahead = wide.dropna(subset=["leaks"])
    notes = [WORDS.replace("%", " %")]
    if len(ahead):
        notes.append(AHEAD + "; ".join(f"{row['attention']} ({row['leaks']})" for row in ahead.to_dict("records")))
    return "\n\n".join([f"# {escape(title)}", table(header, lines, left={0}), *map(escape, notes)]) + "\n"


def _score(row: dict[Any, Any]) -> str:
    if wording.missing(row["low"]):
        return wording.number(row["score"])
    return f"{wording.number(row['score'])} [{wording.number(row['low'])}, {wording.number(row['high'])}]"
