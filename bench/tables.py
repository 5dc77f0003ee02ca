"""Records to tidy frames: `runs`, `scores` and `history`, the input of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bench import plan
from bench.config import Budget
from bench.errors import UserError
from bench.report.frames import Frames
from bench.store import Store, digest, read_history


def read_frames(store: Store, names: Mapping[str, Mapping[str, str]] | None = None) -> tuple[Frames, list[str]]:
    """Frames of the newest record of every run, and one warning line for everything that was set aside or is odd.

    Args:
        names: run id -> row names by which the caller knows it; the record's own where there are none.
    """
    records, warnings = store.read_all()
    runs, scores, history = [], [], []
    for record in records:
        record["names"] = (names or {}).get(record["run_id"], record["names"])
        runs.append(_run(record, _stale(record, warnings)))
        scores += [{"run_id": record["run_id"], **score} for score in record.get("scores", [])]
        folder = store.attempts(record["run_id"])[-1]
        # a record from before mechanisms had losses of their own lacks the column
        history += [{"run_id": record["run_id"], "auxiliary_loss": 0.0, **row} for row in read_history(folder)]
    return Frames.from_rows(runs, scores, history), sorted(set(warnings))


def _stale(record: dict[str, Any], warnings: list[str]) -> bool:
    try:
        return plan.is_stale(record)
    except UserError as error:
        warnings.append(f"{record['names']['attention']}: its source cannot be found, rows count as stale ({error})")
        return True


def _conditions(record: dict[str, Any]) -> str:
    """Equal for runs that may stand on one board."""
    config = record["config"]
    budget = Budget(**config["budget"]).identity()
    return digest(
        dict(
            task=plan.settings_of(config["task"]),
            version=record["task"]["version"],
            backbone=config["backbone"],
            budget=budget,
            contents=record.get("contents"),
        )
    )


def _run(record: dict[str, Any], stale: bool) -> dict[str, Any]:
    """One row of `runs`; what a failed run did not measure is NaN."""
    task, names, environment = record["task"], record["names"], record["environment"]
    training, cost = record.get("training", {}), record.get("efficiency", {})
    nan = math.nan
    return dict(
        run_id=record["run_id"],
        attempt=record["attempt"],
        config_id=record["config_id"],
        cell_id=record["cell_id"],
        conditions_id=_conditions(record),
        data_id=digest(record["data"]) if record.get("data") else None,
        data_seed=record["seed"] if task.get("seeded", True) else 0,
        stale=stale,
        status=record["status"],
        reason=record["reason"],
        task=names["task"],
        task_id=task.get("id"),
        task_version=task["version"],
        task_group=task.get("group"),
        backbone=names["backbone"],
        attention=names["attention"],
        pattern=record.get("pattern"),
        leaks=record.get("leaks"),
        budget=names["budget"],
        seed=record["seed"],
        search=record.get("search", "grid"),
        learning_rate=record["learning_rate"],
        metric=task.get("primary"),
        metric_unit=task.get("unit"),
        higher_is_better=task.get("higher_is_better"),
        chance=nan if task.get("chance") is None else task["chance"],
        num_parameters=record.get("model", {}).get("num_parameters", nan),
        state_bytes=cost.get("state_bytes", nan),
        state_length=cost.get("state_length", nan),
        steps=training.get("steps", nan),
        max_steps=training.get("max_steps", record["config"]["budget"]["max_steps"]),
        examples=training.get("examples", nan),
        train_seconds=training.get("seconds", nan),
        tokens_per_second=training.get("tokens_per_second", nan),
        peak_memory_bytes=cost.get("peak_memory_bytes", nan),
        decode_ms_per_token=cost.get("decode_ms_per_token", nan),
        device=environment.get("device_name") or environment.get("cpu"),
        load=environment.get("load", nan),
        gpu_runs=environment.get("side_by_side", nan) if "cuda" in environment else nan,
        dtype=record["precision"],
        torch=environment["torch"],
        python=environment["python"],
        git_commit=environment.get("git_commit"),
        git_dirty=environment.get("git_dirty"),
        started_at=record["started_at"],
        wall_seconds=record.get("wall_seconds", nan),
    )
