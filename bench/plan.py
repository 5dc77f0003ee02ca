"""From composed configurations to planned cells: identity of runs, what is recorded, what is left to do. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import source
from bench.config import Budget, Choice
from bench.store import Store, digest

TRAINING_SOURCE = "bench.training"  # its VERSION is part of every identity
ALWAYS_RETRIED = ("killed", "interrupted")  # nobody's fault; other failures are results until retry=[...] says otherwise


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

    @property
    def budget(self) -> Budget:
        return Budget(**self.parts["budget"])

    @property
    def title(self) -> str:
        return f"{self.names['task']} {self.names['backbone']} {self.names['attention']}"


def cell(choice: Choice) -> Cell:
    """The cell of a configuration, with its replicas: every learning rate of the grid for every seed."""
    plugins = tuple(choice.settings["plugins"])
    task = source.resolve(choice.parts["task"]["_target_"], plugins)
    mechanism = source.source_hash(tuple(source.targets(choice.parts["attention"])), plugins)
    common = dict(
        program=training_version(),
        task=choice.parts["task"],
        task_version=source.literal(task, "version"),
        backbone=choice.parts["backbone"],
        attention=choice.parts["attention"],
        budget=choice.budget.identity(),
    )
    with_source = {**common, "attention_source": mechanism}
    replicas = [
        Replica(
            run_id=digest({**with_source, "learning_rate": rate, "seed": seed}),
            config_id=digest({**common, "learning_rate": rate, "seed": seed}),
            learning_rate=rate,
            seed=seed,
        )
        for rate in choice.budget.learning_rates
        for seed in choice.seeds
    ]
    return Cell(
        id=digest(with_source),
        parts=choice.parts,
        names=choice.names,
        task_version=common["task_version"],
        source_hash=mechanism,
        replicas=replicas,
        settings=choice.settings,
    )


def training_version() -> int:
    """`VERSION` of the training program, read without importing it."""
    import ast
    from pathlib import Path

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
        known = {replica.run_id for replica in old.replicas}
        old.replicas += [replica for replica in new.replicas if replica.run_id not in known]
    return list(merged.values())


def outstanding(cell: Cell, store: Store, retry: Sequence[str] = (), warnings: list[str] | None = None) -> list[Replica]:
    """Replicas without a final record: never run, or ended with a status that is to be run again."""
    again = {*ALWAYS_RETRIED, *retry}
    left = []
    for replica in cell.replicas:
        record = store.latest(replica.run_id, warnings)
        if record is None or record["status"] in again:
            left.append(replica)
    return left
