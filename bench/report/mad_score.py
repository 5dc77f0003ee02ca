"""MAD's score: the mean over settings of the accuracy that a mechanism reaches at its best hyperparameters.

A setting is a skill at its baseline or at one change of one factor; a task of MAD says which by its id
("mad_recall/clean,vocab_size=32").

Source: Poli et al. 2024, https://arxiv.org/abs/2403.17844, section 3. Differs: the best learning rate is the one with
the best mean on `valid`, where they take the best of six runs on test; seeds give an interval; settings that a
mechanism has no result for are left out and counted.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from bench.report import statistics
from bench.report.frames import Frames

BOARD = ["protocol", "backbone", "budget"]  # what a score is compared within
COLUMNS = [*BOARD, "attention", "score", "low", "high", "settings", "settings_all"]


def mad_runs(frames: Frames) -> pd.DataFrame:
    """The finished runs of MAD's skills: BOARD, attention, setting, learning_rate, seed, valid and test.

    Of one setting under several conditions (an edited YAML) the newest counts.
    """
    runs = frames.runs[frames.runs["task_id"].str.startswith("mad_").fillna(False) & (frames.runs["status"] == "ok")]
    runs = runs[~runs["stale"].fillna(False)].sort_values(["started_at", "run_id"])
    runs = runs.assign(
        setting=runs["task_id"], protocol=runs["task_id"].str.extract(r"/([^,]*)", expand=False).astype("string")
    )
    newest = runs.groupby([*BOARD, "setting"])["conditions_id"].transform("last")
    runs = runs[runs["conditions_id"] == newest]
    whole = frames.scores[frames.scores["slice_key"] == "all"]
    wide = whole.pivot_table(index=["run_id", "metric"], columns="split", values="value").reindex(
        columns=["valid", "test"]
    )
    joined = runs.join(wide, on=["run_id", "metric"])
    return joined[[*BOARD, "attention", "setting", "learning_rate", "seed", "valid", "test"]].reset_index(drop=True)


def mad_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Scores of all mechanisms, best first within a board.

    Args:
        runs: as `mad_runs` gives them, one row per run.

    Returns:
        COLUMNS; `settings` of `settings_all` are in the mean, low and high bound the mean over seeds at 95 % and are
        missing where a setting has one seed.
    """
    rows = []
    for board, own in runs.dropna(subset=["valid", "test"]).groupby(BOARD, sort=True):
        for attention, its in own.groupby("attention", sort=True):
            best = [_at_best_rate(group) for _, group in its.groupby("setting", sort=True)]
            means, errors, freedoms = zip(*best, strict=True)
            score = float(np.mean(means))
            shares = [error2 / len(best) ** 2 for error2 in errors]
            low, high = statistics.sum_interval(score, shares, list(freedoms)) or (np.nan, np.nan)
            bounds = np.clip([low, high], 0.0, 1.0)
            rows.append([*board, attention, score, *bounds, len(best), own["setting"].nunique()])
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values([*BOARD, "score"], ascending=[True] * len(BOARD) + [False], ignore_index=True)


def best_rate(group: pd.DataFrame) -> float | None:
    """The learning rate of one mechanism in one setting, by `valid` of the seeds that have every rate."""
    valid: dict[float, dict[int, float | None]] = {}
    for run in group.to_dict("records"):
        valid.setdefault(run["learning_rate"], {})[run["seed"]] = run["valid"]
    return statistics.choose_rate(valid)


def _at_best_rate(group: pd.DataFrame) -> tuple[float, float, int]:
    """Mean test over seeds at the learning rate that is best on valid, its squared error, seeds - 1."""
    rate = best_rate(group)
    values = group.loc[group["learning_rate"] == rate, "test"].tolist()
    return (*statistics.mean_error(values), len(values) - 1)
