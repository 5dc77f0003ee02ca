"""A child process per cell: started, listened to, limited in time, and classified when it dies. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench import cell as cell_module
from bench.config import ROOT
from bench.plan import Cell, Replica
from bench.store import Store

STARTUP_SECONDS = 300.0  # imports, data; a replica's own limit starts with its first event
MALLOC = "4294967296"  # bytes; glibc then keeps memory between steps: 1.2-1.9x faster training steps on a CPU


def environment(slot: Mapping[str, str]) -> dict[str, str]:
    """Environment of a child: one thread, memory kept, deterministic GPU kernels, and what the slot asks for."""
    defaults = dict(
        OMP_NUM_THREADS="1",
        MALLOC_TRIM_THRESHOLD_=MALLOC,
        MALLOC_MMAP_THRESHOLD_=MALLOC,
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        PYTHONUNBUFFERED="1",
    )
    path = os.pathsep.join(filter(None, [str(ROOT), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    return {**defaults, **os.environ, **slot, "PYTHONPATH": path}


@dataclass
class Outcome:
    """How a child ended before it had finished its list: (status, reason) for the replicas that ended with it.

    victims: the replica it was working on; none when it died between two; all when it died before its first.
    """

    status: str
    reason: str
    victims: list[Replica]


@dataclass
class Child:
    """A running child: its job, its pipe of events and its clock."""

    cell: Cell
    todo: list[Replica]
    process: subprocess.Popen
    events: int
    errors: IO[bytes]
    deadline: float
    oom_kills: int
    current: Replica | None = None
    step: int = 0
    metric: float | None = None
    device: dict[str, Any] = field(default_factory=dict)  # what it said it runs on
    fatal: str | None = None  # why none of its replicas can run
    others_can_run: bool = False  # ... while those of other cells can
    timed_out: bool = False
    buffer: bytes = b""
    finished: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, cell: Cell, replicas: list[Replica], store: Store, facts: dict, slot: Mapping[str, str]) -> Child:
        """Start a child in a process group of its own."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.cell"],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                pass_fds=[writer],
                start_new_session=True,
                env=environment(slot),
            )
        finally:
            os.close(writer)
        assert process.stdin is not None
        try:
            process.stdin.write(cell_module.job(cell, replicas, store, facts, writer).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it died at once; seen when it is reaped
        return cls(
            cell=cell,
            todo=list(replicas),
            process=process,
            events=reader,
            errors=errors,
            deadline=time.monotonic() + STARTUP_SECONDS,
            oom_kills=_oom_kills(),
        )

    def listen(self) -> list[dict[str, Any]]:
        """Events that have arrived, the child's state brought up to them."""
        while True:
            try:
                chunk = os.read(self.events, 65536)
            except BlockingIOError:
                break
            if not chunk:
                break
            self.buffer += chunk
        *lines, self.buffer = self.buffer.split(b"\n")
        arrived = [json.loads(line) for line in lines]
        for event in arrived:
            self._take(event)
        return arrived

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self.current = next(r for r in self.todo if r.run_id == event["run_id"])
            self.step, self.metric, self.device = 0, None, event.get("device", {})
            self.deadline = time.monotonic() + self.cell.budget.time_limit_seconds
        elif event["event"] == "step":
            self.step, self.metric = event["step"], event["metric"]
        elif event["event"] == "done":
            self.todo = [r for r in self.todo if r.run_id != event["run_id"]]
            self.finished.append(event)
            self.current = None
            self.deadline = time.monotonic() + STARTUP_SECONDS
        elif event["event"] == "fatal":
            self.fatal, self.others_can_run = event["reason"], event["others_can_run"]

    def alive(self) -> bool:
        """Whether it works; past its limit, or with nothing left to do, it is killed first."""
        if self.process.poll() is not None:
            return False
        if self.todo and time.monotonic() <= self.deadline:
            return True
        self.timed_out = bool(self.todo)
        self.kill()
        return False

    def kill(self) -> None:
        """End the whole process group, at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()

    def close(self) -> Outcome | None:
        """Release a dead child's files and say what happened to the replicas in its hands; None: all done."""
        self.listen()
        tail = self._last_words()
        os.close(self.events)
        self.errors.close()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        if not self.todo or self.fatal:
            return None
        victims = [self.current] if self.current else [] if self.finished else self.todo
        code = self.process.returncode
        if self.timed_out:
            if self.current is None:
                return Outcome("timeout", f"the process did not start within {STARTUP_SECONDS:g} s", victims)
            limit = self.cell.budget.time_limit_seconds
            return Outcome("timeout", f"no result within {limit:g} s; raise budget.time_limit_seconds", victims)
        if code == -signal.SIGKILL:
            if _oom_kills() > self.oom_kills:
                return Outcome("oom", "the system ended the process: out of memory", victims)
            return Outcome("killed", "the process was killed (SIGKILL)", victims)
        if code == -signal.SIGTERM:
            return Outcome("killed", "the process was ended (SIGTERM)", victims)
        if code < 0:
            return Outcome("error", f"the process died by {signal.Signals(-code).name}{tail}", victims)
        return Outcome("error", f"the process ended with status {code} and no record{tail}", victims)

    def _last_words(self) -> str:
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 4096))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:300]}" if lines else ""


def _oom_kills() -> int:
    """How often the kernel has ended a process for want of memory."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):  # of the group; without one, of the machine
        try:
            fields = dict(line.split() for line in Path(path).read_text().splitlines())
            return int(fields["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0
