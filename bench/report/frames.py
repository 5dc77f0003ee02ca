"""The tidy frames that every number, table and plot of the report is a pure function of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# column: (dtype, meaning). Nullable dtypes: what a failed run did not measure is missing, never 0.
RUNS = {
    "run_id": ("string", "hash of the resolved configuration and the mechanism's source"),
    "attempt": ("Int64", "1, or more when the run was repeated; only the newest attempt is here"),
    "config_id": ("string", "the run id without the mechanism's source"),
    "cell_id": ("string", "hash of all but learning rate and seed: one configuration of one mechanism"),
    "conditions_id": (
        "string",
        "hash of what every row of a board must share: task, backbone and budget, values included",
    ),
    "data_id": ("string", "hash of the hashes of all splits; missing: none were made"),
    "data_seed": ("Int64", "of the data; 0 for all seeds where they are the same"),
    "leaks": ("string", "how outputs come to depend on the future, in a causal slot; missing: they do not"),
    "stale": ("boolean", "the mechanism, the task or the program has changed since; not ranked"),
    "status": ("string", "ok, diverged, nan, oom, timeout, unsupported, error, killed or interrupted"),
    "reason": ("string", "why it is not ok, one line"),
    "task": ("string", "row name of the task"),
    "task_id": ("string", "task/protocol"),
    "task_version": ("Int64", "bumped when data or scoring change"),
    "task_group": ("string", "boards of one group are read together; missing: the task stands alone"),
    "backbone": ("string", "row name of the backbone"),
    "attention": ("string", "row name of the mechanism"),
    "pattern": ("string", "of the slot that the mechanism fills: 'causal self', 'noncausal cross', ..."),
    "budget": ("string", "row name of the budget"),
    "seed": ("Int64", "of weights and data"),
    "search": ("string", "of the learning rate: grid, every rate for every seed, or first_seed, for the first alone"),
    "learning_rate": ("float64", "peak"),
    "metric": ("string", "name of the primary metric"),
    "metric_unit": ("string", "its unit; 'fraction' lies in [0, 1]"),
    "higher_is_better": ("boolean", "its direction"),
    "chance": ("float64", "its value for guessing"),
    "num_parameters": ("float64", "trainable, shared ones once"),
    "state_bytes": ("float64", "measured decode state of one sequence after state_length tokens, all layers"),
    "state_length": ("float64", "tokens"),
    "steps": ("float64", "optimiser steps done"),
    "max_steps": ("float64", "optimiser steps allowed"),
    "examples": ("float64", "training examples seen"),
    "train_seconds": ("float64", "in training steps, evaluation excluded"),
    "tokens_per_second": ("float64", "training tokens per second"),
    "peak_memory_bytes": ("float64", "GPU: allocated by torch; CPU: resident, of the process"),
    "decode_ms_per_token": ("float64", "median at batch 1"),
    "device": ("string", "name of the GPU or CPU"),
    "load": ("float64", "load of the machine per core in the last minute of the run, this run included"),
    "gpu_runs": ("float64", "runs that the sweep kept on the same GPU at once, this one included; missing on a CPU"),
    "dtype": ("string", "float32 or bfloat16"),
    "torch": ("string", "version"),
    "python": ("string", "version"),
    "git_commit": ("string", "of the program"),
    "git_dirty": ("boolean", "the checkout had changes"),
    "started_at": ("string", "ISO 8601 with offset"),
    "wall_seconds": ("float64", "of the whole run"),
}
SCORES = {
    "run_id": ("string", "see runs"),
    "split": ("string", "valid or test"),
    "metric": ("string", "name"),
    "value": ("float64", "mean over the slice"),
    "count": ("Int64", "items of the slice"),
    "slice_key": (
        "string",
        "'all'; segment, length, class, position, ...; 'confusion', 'trace0', ...; 'floor': a trivial solver's score",
    ),
    "slice_value": (
        "string",
        "'' for the whole split, or such as '64x4' (length x pairs), '16-31', 'true>predicted', a step, a solver",
    ),
}
HISTORY = {
    "run_id": ("string", "see runs"),
    "step": ("Int64", "optimiser steps done"),
    "train_loss": ("float64", "the task's loss, mean since the last row"),
    "auxiliary_loss": ("float64", "sum of what mechanisms add to it (balance, distillation), mean likewise"),
    "valid_loss": ("float64", "the task's loss on valid: nats for a cross-entropy"),
    "valid_metric": ("float64", "primary metric on valid"),
    "learning_rate": ("float64", "at this step"),
    "seconds": ("float64", "training time so far"),
}
SCHEMAS = {"runs": RUNS, "scores": SCORES, "history": HISTORY}


@dataclass(frozen=True)
class Frames:
    """Three long tables, one row per run, per score and per evaluation; columns in RUNS, SCORES, HISTORY.

    Rows are sorted, so the order in which records were found changes nothing.
    """

    runs: pd.DataFrame
    scores: pd.DataFrame
    history: pd.DataFrame

    @classmethod
    def from_rows(
        cls,
        runs: Iterable[Mapping[str, Any]],
        scores: Iterable[Mapping[str, Any]],
        history: Iterable[Mapping[str, Any]],
    ) -> Frames:
        """Rows as dictionaries to typed frames; None and NaN are missing.

        Raises:
            ValueError: a row lacks a column or has one that is not in the schema.
        """
        return cls(
            runs=_frame("runs", runs, ["run_id"]),
            scores=_frame("scores", scores, ["run_id", "split", "metric", "slice_key", "slice_value"]),
            history=_frame("history", history, ["run_id", "step"]),
        )

    def of(self, runs: pd.DataFrame) -> Frames:
        """The same frames restricted to some rows of `runs`."""
        ids = runs["run_id"]
        return Frames(
            runs=runs.reset_index(drop=True),
            scores=self.scores[self.scores["run_id"].isin(ids)].reset_index(drop=True),
            history=self.history[self.history["run_id"].isin(ids)].reset_index(drop=True),
        )


def _frame(name: str, rows: Iterable[Mapping[str, Any]], order: list[str]) -> pd.DataFrame:
    import pandas as pd

    schema, rows = SCHEMAS[name], list(rows)
    for row in rows:
        if row.keys() != schema.keys():
            odd = sorted(row.keys() ^ schema.keys())
            raise ValueError(f"a row of {name} has columns missing or unknown: {', '.join(odd)}")
    # object first: a column of None and numbers must not pass through a guessed type
    frame = pd.DataFrame(rows, columns=list(schema), dtype=object)
    for column, (dtype, _) in schema.items():
        frame[column] = frame[column].where(frame[column].notna(), None).astype(dtype)  # type: ignore[call-overload]
    return frame.sort_values(order, kind="stable", ignore_index=True)
