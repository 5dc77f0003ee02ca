"""From composed configurations to planned cells: identity of runs, what is recorded and what is left. No torch here."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bench import source
from bench.config import Budget, Choice
from bench.errors import UserError
from bench.store import Store, digest

ALWAYS_RETRIED = (
    "killed",
    "interrupted",
)  # nobody's fault; other failures are results until retry=[...] says otherwise


@dataclass(frozen=True)
class Replica:
    """One run: a learning rate and a seed of a cell."""

    run_id: str
    config_id: str  # the run id without the mechanism's source: equal for a stale record and its successor
    learning_rate: float
    seed: int


@dataclass
class Cell:
    """Task x backbone x attention x budget; its replicas share one process, one data set and one program."""

    id: str
    parts: dict[str, Any]
    names: dict[str, str]
    task_version: int
    source_hash: str
    replicas: list[Replica]
    settings: dict[str, Any] = field(default_factory=dict)
    contents: str | None = None  # hash of the user's own data

    @property
    def budget(self) -> Budget:
        return Budget(**self.parts["budget"])

    @property
    def planned(self) -> int:
        """Runs that its search asks for, when the mechanism succeeds with the first seed."""
        scouts = self.scouts
        return len(scouts) + len({replica.seed for replica in self.replicas if replica not in scouts})

    @property
    def scouts(self) -> list[Replica]:
        """The replicas that choose the learning rate: all, or those of the first seed."""
        if self.settings["search"] == "grid":
            return self.replicas
        return [replica for replica in self.replicas if replica.seed == self.replicas[0].seed]

    @property
    def title(self) -> str:
        return f"{self.names['task']} {self.names['backbone']} {self.names['attention']}"


def identity(parts: dict[str, Any], plugins: Sequence[str] = (), contents: str | None = None) -> dict[str, Any]:
    """Everything a cell's results depend on, as code and configs stand now.

    `attention_source` is the hash of the code of all mechanisms, those that the backbone itself brings included.

    Args:
        contents: hash of the data at the task's `path`; None: it has none.

    Raises:
        UserError: a `_target_` that cannot be found.
    """
    names = tuple(plugins)
    own = {} if contents is None else {"contents": contents}
    return own | dict(
        program=training_version(),
        task=settings_of(parts["task"]),
        task_version=source.literal(source.resolve(parts["task"]["_target_"], names), "version"),
        backbone=parts["backbone"],
        attention=parts["attention"],
        attention_source=mechanism_hash(parts, names),
        budget=Budget(**parts["budget"]).identity(),
    )


def settings_of(task: dict[str, Any]) -> dict[str, Any]:
    """What a task's data depend on: all but the place that they lie in, for which `contents` stands."""
    return {key: value for key, value in task.items() if key != "path"}


@cache
def contents(path: str | None) -> str | None:
    """Hash of names and bytes of the files at a path of the user's, but hidden ones; None: of none. Once a process.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    if path is None:
        return None
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(
            f"task.path: no such file or folder: {path}; type task.path=FOLDER with the data, or leave it out"
        )
    inside = [file.relative_to(found) for file in found.rglob("*") if file.is_file()]
    visible = sorted(file for file in inside if not any(part.startswith(".") for part in file.parts))
    files = [found] if found.is_file() else [found / file for file in visible]
    known = hashlib.sha256()
    try:
        for file in files:
            known.update(file.relative_to(found).as_posix().encode() + b"\0")
            with file.open("rb") as stream:
                known.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise UserError(f"task.path: cannot read {error.filename}: {error.strerror or error}") from error
    return known.hexdigest()[:20]


def mechanism_hash(parts: dict[str, Any], plugins: Sequence[str] = ()) -> str:
    """Hash of the code of all mechanisms of a cell as it stands now, those that the backbone brings included."""
    mechanisms = source.targets(parts["attention"]) + source.targets(parts["backbone"])[1:]
    return source.source_hash(tuple(mechanisms), tuple(plugins))


def replica(common: dict[str, Any], learning_rate: float, seed: int) -> Replica:
    """The run of a learning rate and a seed in the cell that `common` identifies."""
    run = {**common, "learning_rate": learning_rate, "seed": seed}
    unsourced = {key: value for key, value in run.items() if key != "attention_source"}
    return Replica(run_id=digest(run), config_id=digest(unsourced), learning_rate=learning_rate, seed=seed)


def cell(choice: Choice) -> Cell:
    """The cell of a configuration, with its replicas: every learning rate of the grid for every seed."""
    path = choice.parts["task"].get("path")
    own = contents(path)
    names = dict(choice.names)
    if own is not None:  # two texts of one file name are two rows
        file = Path(path).name
        names["task"] = names["task"].replace(f"path={file}", f"path={file}-{own[:6]}")
    common = identity(choice.parts, choice.settings["plugins"], own)
    return Cell(
        id=digest(common),
        parts=choice.parts,
        names=names,
        task_version=common["task_version"],
        source_hash=common["attention_source"],
        replicas=[replica(common, rate, seed) for rate in choice.budget.learning_rates for seed in choice.seeds],
        settings=choice.settings,
        contents=own,
    )


def is_stale(record: dict[str, Any]) -> bool:
    """Whether the same configuration would be another run today: the mechanism, the task or the program has changed.

    The user's own data count as they were: whatever lies at their path today, the result is of those.

    Raises:
        UserError: the mechanism or the task is no longer there.
    """
    common = identity(record["config"], record["plugins"], record.get("contents"))
    return replica(common, record["learning_rate"], record["seed"]).run_id != record["run_id"]


@cache
def training_version() -> int:
    """`VERSION` of the training program, read without importing it."""
    tree = ast.parse(Path(__file__).with_name("training.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "VERSION":
            return int(ast.literal_eval(statement.value))
    raise LookupError("bench/training.py has no VERSION")


def merge(cells: Iterable[Cell]) -> list[Cell]:
    """Cells with the same identity become one, with the replicas of both (a sweep over seeds)."""
    merged: dict[str, Cell] = {}
    for new in cells:
        old = merged.setdefault(new.id, new)
        known = {planned.run_id for planned in old.replicas}
        old.replicas += [planned for planned in new.replicas if planned.run_id not in known]
    return list(merged.values())


def outstanding(
    cell: Cell, store: Store, retry: Sequence[str] = (), warnings: list[str] | None = None
) -> tuple[list[Replica], list[Replica]]:
    """The replicas that the cell's search needs as far as the records tell, and those of them that are left to run.

    Left are those without a final record: never run, or ended with a status that is to be run again. What a search by
    the first seed needs of the others is known once that seed is recorded at every rate.
    """
    records = {planned.run_id: store.latest(planned.run_id, warnings) for planned in cell.replicas}
    needed = _needed(cell, {run_id: record for run_id, record in records.items() if record})
    again = {*ALWAYS_RETRIED, *retry}
    return needed, [run for run in needed if (records[run.run_id] or {"status": ALWAYS_RETRIED[0]})["status"] in again]


def _needed(cell: Cell, records: dict[str, dict[str, Any]]) -> list[Replica]:
    from bench.report.statistics import choose_rate

    scouts, valid = cell.scouts, {}
    if len(scouts) == len(cell.replicas):
        return scouts
    for scout in scouts:
        record = records.get(scout.run_id)
        if record is None or record["status"] in ALWAYS_RETRIED:
            return scouts
        valid[scout.learning_rate] = {scout.seed: record.get("valid") if record["status"] == "ok" else None}
    rate = choose_rate(valid, higher_is_better=records[scouts[0].run_id]["task"].get("higher_is_better", True))
    return scouts + [run for run in cell.replicas if run not in scouts and run.learning_rate == rate]
