"""MAD's score: the mean over skills of the accuracy that a mechanism reaches at its best hyperparameters.

A skill is tried at its baseline and at changes of one factor, and counts with the mean over those settings; a task of
MAD says which setting it is by its id ("mad_recall/clean,vocab_size=32").

Source: Poli et al. 2024, https://arxiv.org/abs/2403.17844, section 3. Differs: the best learning rate is the one with
the best mean on `valid`, where they take the best of six runs on test; seeds give an interval; settings that a
mechanism has no result for are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.report import statistics
from bench.report.leaderboard import Board

KEY = ["protocol", "backbone", "budget"]  # what a score is compared within
COLUMNS = [*KEY, "attention", "score", "low", "high", "settings", "settings_all", "leaks"]


def mad_runs(boards: Sequence[Board]) -> pd.DataFrame:
    """The runs that count on the boards of MAD's skills: KEY, skill, setting and the columns of `Board.runs`."""
    found = []
    for board in boards:
        ids = board.runs["task_id"].dropna()
        if len(ids) and ids.iloc[-1].startswith("mad_"):
            skill, _, rest = ids.iloc[-1].partition("/")
            found.append(board.runs.assign(skill=skill, setting=ids.iloc[-1], protocol=rest.partition(",")[0]))
    if not found:
        return pd.DataFrame(columns=[*KEY, "skill", "setting", "attention", "leaks", "seed", "chosen", "good", "test"])
    return pd.concat(found, ignore_index=True)


def mad_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Scores of all mechanisms, best first within a KEY, those that look ahead behind the others.

    Args:
        runs: as `mad_runs` gives them, one row per run.

    Returns:
        COLUMNS; `settings` of `settings_all` are in the mean, low and high bound the mean over seeds at 95 % and are
        missing where a setting has one seed.
    """
    rows = []
    for key, own in runs.groupby(KEY, sort=True):
        for attention, its in own[(own["chosen"] & own["good"]).astype(bool)].groupby("attention", sort=True):
            settings = [(skill, values["test"].tolist()) for (skill, _), values in its.groupby(["skill", "setting"])]
            of = pd.Series([skill for skill, _ in settings])
            weights = 1 / (of.map(of.value_counts()) * of.nunique())  # skills count alike, and settings within one
            means, errors = zip(*(statistics.mean_error(values) for _, values in settings), strict=True)
            score = float(weights @ np.array(means))
            parts = [weight**2 * error2 for weight, error2 in zip(weights, errors, strict=True)]
            interval = statistics.sum_interval(score, parts, [len(values) - 1 for _, values in settings])
            low, high = np.clip(interval or (np.nan, np.nan), 0.0, 1.0)
            leaks = next(iter(its["leaks"].dropna()), None)
            rows.append([*key, attention, score, low, high, len(settings), own["setting"].nunique(), leaks])
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values(
        [*KEY, "leaks", "score"],
        ascending=[True] * len(KEY) + [True, False],
        key=lambda column: column.notna() if column.name == "leaks" else column,
        ignore_index=True,
    )
