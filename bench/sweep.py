"""A sweep: planned cells, run side by side in children, until every planned run has a record. No torch here."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bench import cell as cell_module
from bench import environment
from bench.errors import UserError
from bench.isolation import Child, Outcome
from bench.plan import ALWAYS_RETRIED, Cell, Replica, outstanding
from bench.progress import Progress
from bench.store import Store, StoreError

TICK_SECONDS = 0.05
FAILED = ("error", "oom", "timeout", "killed", "interrupted")  # not a mechanism's result; the exit status says so


@dataclass
class Job:
    """Replicas of a cell for one child; `lock` is shared by the jobs of a cell."""

    cell: Cell
    replicas: list[Replica]
    lock: FileLock


@dataclass
class Sweep:
    """State of a running sweep.

    Args:
        cells: what is planned.
        store: where it goes.
        retry: statuses to run again.
        slots: environment of each child that may run at the same time.
        progress: told of everything that happens.
    """

    cells: Sequence[Cell]
    store: Store
    retry: Sequence[str]
    slots: list[dict[str, str]]
    progress: Progress
    facts: dict[str, Any]
    queue: list[Job] = field(default_factory=list)
    running: dict[int, tuple[Job, Child]] = field(default_factory=dict)
    held: dict[str, FileLock] = field(default_factory=dict)
    scouted: set[str] = field(default_factory=set)  # ids of cells whose first seed had its turn
    searched: list[Cell] = field(default_factory=list)  # of these, those whose other seeds have theirs now
    interrupted: str = ""  # by what
    statuses: Counter = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)  # cell id -> why its settings cannot be run

    def run(self) -> None:
        """Run all that is outstanding.

        Raises:
            UserError: the results folder cannot be written, or there is no such device.
            KeyboardInterrupt: Ctrl-C or SIGTERM; what was running is recorded as interrupted.
        """
        self.store.prepare()
        waiting = list(self.cells)
        handlers = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (waiting or self.searched or self.queue or self.running) and not self.interrupted:
                waiting, self.searched = self._admit([*self.searched, *waiting]), []
                self._start()
                self._watch()
                self.progress.waiting(len(waiting) if not (self.queue or self.running) else 0)
                time.sleep(TICK_SECONDS)
            if self.interrupted:
                self._stop("interrupted", self.interrupted)
                raise KeyboardInterrupt
        finally:
            for _, child in self.running.values():
                child.kill()
            for lock in self.held.values():
                lock.release()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:  # a second Ctrl-C does not wait for anything
            for _, child in self.running.values():
                child.kill()
            os._exit(130)
        self.interrupted = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def _admit(self, waiting: list[Cell]) -> list[Cell]:
        """Queue the waiting cells that no other sweep is working on; those that are recorded meanwhile drop out."""
        still: list[Cell] = []
        room = len(self.slots) - len(self.queue)
        for index, cell in enumerate(waiting):
            if room <= 0:
                return still + waiting[index:]
            lock = FileLock(str(self.store.lock_path(cell.id)))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                still.append(cell)
                continue
            except OSError as error:
                raise StoreError(f"cannot lock {lock.lock_file}: {error.strerror or error}") from error
            needed, left = outstanding(cell, self.store, self.retry, self.warnings)
            if cell.id in self.scouted:
                left = [replica for replica in left if replica not in cell.scouts]
                self.progress.settled(cell, len(needed))
            else:
                self.progress.admitted(cell, len(needed) - len(left))
                if not any(replica in cell.scouts for replica in left):
                    self.scouted.add(cell.id)
                    self.progress.settled(cell, len(needed))
            if not left:
                lock.release()
                continue
            self.held[cell.id] = lock
            shards = max(1, len(self.slots) // max(1, len(self.cells)))
            for shard in _split(left, shards):
                self.queue.append(Job(cell, shard, lock))
                room -= 1
        return still

    def _start(self) -> None:
        for number, slot in enumerate(self.slots):
            if number in self.running or not self.queue:
                continue
            job = self.queue.pop(0)
            facts = {**self.facts, "side_by_side": self.slots.count(slot)}
            self.running[number] = job, Child.start(job.cell, job.replicas, self.store, facts, slot)

    def _watch(self) -> None:
        for number, (job, child) in list(self.running.items()):
            for event in child.listen():
                self._tell(child, event)
            if child.fatal is None and child.alive():
                continue
            if child.fatal:
                child.kill()
            del self.running[number]
            before = len(child.finished)
            outcome = child.close()
            for event in child.finished[before:]:
                self._tell(child, event)
            if child.fatal and not child.others_can_run:
                raise UserError(child.fatal)
            if child.fatal:
                self.impossible[job.cell.id] = child.fatal
                self.queue = [other for other in self.queue if other.cell.id != job.cell.id]
            if outcome is not None:
                self._record_failure(job, child, outcome)
            if not any(j.cell.id == job.cell.id for j in self.queue) and not any(
                j.cell.id == job.cell.id for j, _ in self.running.values()
            ):
                self.held.pop(job.cell.id).release()
                by_first_seed = len(job.cell.scouts) < len(job.cell.replicas)
                if by_first_seed and job.cell.id not in self.scouted | self.impossible.keys():
                    self.scouted.add(job.cell.id)
                    self.searched.append(job.cell)

    def _tell(self, child: Child, event: dict[str, Any]) -> None:
        if event["event"] == "done":
            self.statuses[event["status"]] += 1
        self.progress.event(child.cell, event)

    def _record_failure(self, job: Job, child: Child, outcome: Outcome) -> None:
        """Record what a dead child did not, and queue the replicas it had not reached."""
        for replica in outcome.victims:
            record = dict(
                run_id=replica.run_id,
                config_id=replica.config_id,
                cell_id=child.cell.id,
                learning_rate=replica.learning_rate,
                seed=replica.seed,
                status=outcome.status,
                reason=outcome.reason,
                started_at=datetime.now(UTC).isoformat(timespec="seconds"),
                task=dict(version=child.cell.task_version),
                environment={**self.facts, **environment.software(), **environment.processor(), **child.device},
                **cell_module.header(child.cell),
            )
            known = self.store.latest(replica.run_id)
            if known is None or known["status"] in (*ALWAYS_RETRIED, *self.retry):
                cell_module.write(self.store, record, child.cell, [])
            else:
                record = known  # the child had written it before it died
            self._tell(child, {"event": "done", "metric": record.get("valid"), **record})
        left = [replica for replica in child.todo if replica not in outcome.victims]
        if left and not self.interrupted:
            self.queue.insert(0, dataclasses.replace(job, replicas=left))

    def _stop(self, status: str, reason: str) -> None:
        """Kill what runs and record the replicas that were in progress."""
        for number, (job, child) in list(self.running.items()):
            child.listen()
            child.kill()
            child.close()
            del self.running[number]
            if child.current is not None:
                self._record_failure(job, child, Outcome(status, reason, [child.current]))


def _split(replicas: list[Replica], shards: int) -> list[list[Replica]]:
    """Near-equal parts; replicas of a seed stay together so that they share their data."""
    ordered = sorted(replicas, key=lambda replica: replica.seed)
    size = -(-len(ordered) // shards)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def slots(device: str, jobs: str | int) -> list[dict[str, str]]:
    """Environments of the children that run side by side: one per GPU, or one per CPU core.

    Raises:
        UserError: `jobs` is neither auto nor a positive number.
    """
    if jobs != "auto" and not (isinstance(jobs, int) and jobs > 0):
        raise UserError(f"jobs must be auto or a positive whole number, got {jobs!r}")
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if gpus:
        count = len(gpus) if jobs == "auto" else int(jobs)
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    if device.startswith("cuda"):
        return [{} for _ in range(1 if jobs == "auto" else int(jobs))]
    return [{} for _ in range(cores() if jobs == "auto" else int(jobs))]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Names of the GPUs that children may use, without importing torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name for name in listed.split(",") if name.strip() not in ("", "-1")]
    folder = Path("/proc/driver/nvidia/gpus")
    if folder.is_dir():
        return [str(index) for index, _ in enumerate(folder.iterdir())]
    return ["0"] if shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists() else []
