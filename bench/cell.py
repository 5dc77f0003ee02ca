"""One cell from config to records, in a process of its own: the life of a run, readable top to bottom.

The parent (bench.isolation) starts `python -m bench.cell`, writes the job as JSON to its standard input and keeps
that pipe open; events come back as JSON lines on the file descriptor named in the job. When the pipe closes, the
parent is gone and this process ends.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import environment, source
from bench.errors import ImpossibleCell, UserError
from bench.plan import Cell, Replica, mechanism_hash
from bench.store import HISTORY, Store, as_csv

OUT_OF_MEMORY = "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"  # as RuntimeError


def tried(task: Any, backbone: Any, attention: Any) -> dict[str, str]:
    """What building the model once tells: why it cannot be (`why_not`), or how its causal slots leak (`leaks`)."""
    from attentions.base import Attention, Unsupported
    from bench.backbones.base import build

    try:
        model = build(backbone, task.spec, attention, seed=0)
    except Unsupported as error:
        return {"why_not": str(error)}
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    leaks = [layer.leaks for layer in layers if layer.spec.causal and layer.leaks]
    return {"leaks": leaks[0]} if leaks else {}


def run(cell: Cell, replicas: list[Replica], store: Store, facts: dict[str, Any], emit: Callable[..., None]) -> None:
    """Train, evaluate, measure and record every replica.

    Args:
        facts: of the parent: command and commit.
        emit: called with the name of an event and its data.

    Raises:
        ImpossibleCell: impossible settings of task or backbone, or a mechanism that is no longer what was planned.
        UserError: no such device; StoreError: a record cannot be written. Anything else becomes a record's status.
    """
    import torch
    from hydra.utils import instantiate

    from bench.backbones.base import pattern_of

    torch.set_num_threads(1)  # one process per core: threads that wait for each other lose more than they gain
    device = pick_device(cell.settings["device"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    budget = cell.budget
    source.check(cell.parts, cell.settings["plugins"])  # again, here, where it is about to be imported
    if mechanism_hash(cell.parts, cell.settings["plugins"]) != cell.source_hash:
        raise ImpossibleCell(
            f"the code of {cell.names['attention']} has changed since the sweep was planned; type the command again"
        )
    task = make_task(cell.parts["task"])
    backbone, attention, facts_of_model, error = None, None, {}, None
    try:
        backbone = instantiate(cell.parts["backbone"], _convert_="all")
        attention = instantiate(cell.parts["attention"], _convert_="all")
        facts_of_model = tried(task, backbone, attention)
    except UserError as mistake:
        raise ImpossibleCell(str(mistake)) from mistake  # a wrong word in the config, not a fault of the mechanism
    except Exception as exception:
        error = exception
    data: dict[int, Any] = {}
    for replica in replicas:
        better = task.spec.metrics[task.spec.primary].higher_is_better
        emit("start", run_id=replica.run_id, device=environment.accelerator(device), higher_is_better=better)
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        outcome: dict[str, Any] = dict(status="error", reason="")
        history: list[dict[str, float]] = []
        try:
            if error is not None:
                raise error
            if "why_not" in facts_of_model:
                outcome = dict(status="unsupported", reason=facts_of_model["why_not"])
            else:
                key = replica.seed if task.seeded else 0
                if key not in data:
                    data.clear()  # one data set at a time on the device
                    try:
                        data[key] = load(task, key, device)
                    except ValueError as wrong:  # data are missing, or these settings have none
                        raise ImpossibleCell(f"task {cell.names['task']}: {wrong}") from wrong
                outcome, history = replicate(task, backbone, attention, budget, replica, data[key], device, emit)
        except (KeyboardInterrupt, ImpossibleCell):
            raise
        except Exception as exception:
            outcome = dict(zip(("status", "reason"), classify(exception), strict=True))
        record = dict(
            run_id=replica.run_id,
            config_id=replica.config_id,
            cell_id=cell.id,
            learning_rate=replica.learning_rate,
            seed=replica.seed,
            wall_seconds=time.perf_counter() - clock,
            started_at=started,
            task=describe(task, cell),
            pattern=None if backbone is None else pattern_of(backbone),
            leaks=facts_of_model.get("leaks"),
            environment={
                **facts,
                **environment.software(),
                **environment.processor(),
                **environment.accelerator(device),
                "load": environment.load(),
                "deterministic": "bitwise" if device.type == "cpu" else "seeded",
            },
            **header(cell),
            **outcome,
        )
        write(store, record, cell, history)
        emit(
            "done",
            run_id=replica.run_id,
            status=record["status"],
            reason=record.get("reason", ""),
            metric=outcome.get("valid"),
        )


def make_task(config: dict[str, Any]) -> Any:
    """The task of a config.

    Raises:
        ImpossibleCell: its settings are impossible.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise ImpossibleCell(f"task: {error.__cause__ or error}") from error


def load(task: Any, seed: int, device: Any) -> dict[str, Any]:
    """Segments of all splits on the device, their hashes, and the scores of trivial solvers."""
    splits = {split: task.segments(split, seed) for split in ("train", "valid", "test")}
    hashes = {split: [segment.sha256() for segment in segments] for split, segments in splits.items()}
    count = sum(len(segment) for segment in splits["test"])
    floors = [
        dict(
            split="test",
            metric=task.spec.primary,
            value=value,
            count=count,
            slice_key="reference" if name in task.references else "floor",
            slice_value=name,
        )
        for name, value in task.floors(splits, hashes).items()
    ]
    moved = {split: [segment.to(device) for segment in segments] for split, segments in splits.items()}
    return dict(hashes=hashes, floors=floors, splits=moved)


def replicate(
    task: Any,
    backbone: Any,
    attention: Any,
    budget: Any,
    replica: Replica,
    data: dict[str, Any],
    device: Any,
    emit: Any,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """One replica: build, train, select nothing, evaluate `test` once, measure; (fields of the record, history)."""
    from attentions.base import UnsupportedPattern
    from bench import efficiency, training
    from bench.backbones.base import build
    from bench.evaluation import evaluate

    efficiency.reset_peak_memory(device)
    budget = training.within_epochs(budget, task, data["splits"]["train"])
    model = build(backbone, task.spec, attention, replica.seed).to(device)
    result = training.train(
        model,
        task,
        data["splits"],
        budget,
        replica.learning_rate,
        replica.seed,
        device,
        progress=lambda step, metric: emit("step", run_id=replica.run_id, step=step, metric=metric),
    )
    outcome: dict[str, Any] = dict(
        status=result.status,
        reason=result.reason,
        data=data["hashes"],
        model=dict(num_parameters=model.num_parameters),
        training=dict(
            steps=result.steps,
            max_steps=budget.max_steps,
            stopped=result.stopped,
            examples=result.examples,
            tokens=result.tokens,
            auxiliary=result.auxiliary,
            seconds=result.seconds,
            tokens_per_second=result.tokens / result.seconds if result.seconds else None,
        ),
        valid=result.history[-1]["valid_metric"] if result.history else None,
        scores=[],
        efficiency=dict(peak_memory_bytes=efficiency.peak_memory_bytes(device)),
    )
    if result.status == "ok":
        for split in ("valid", "test"):
            outcome["scores"] += evaluate(model, task, data["splits"][split], budget).rows(split)
        outcome["scores"] += data["floors"]
        try:
            decoding = efficiency.decoding(model, task.spec, device)
        except UnsupportedPattern as error:
            outcome["efficiency"]["no_decoding"] = str(error)
            return outcome, result.history
        outcome["efficiency"].update(
            state_bytes=decoding.state_bytes, state_length=decoding.length, decode_ms_per_token=decoding.ms_per_token
        )
    return outcome, result.history


def classify(error: BaseException) -> tuple[str, str]:
    """(status, reason) of an exception in a replica: out of memory, or an error with the line it came from."""
    import traceback

    import torch
    from hydra.errors import InstantiationException

    while isinstance(error, (InstantiationException, ImportError)) and error.__cause__ is not None:
        error = error.__cause__  # Hydra's own text only says where in the config
    text = str(error).strip()
    first = text.splitlines()[0][:500] if text else ""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in OUT_OF_MEMORY):
        return "oom", first or "out of memory"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return "error", f"{type(error).__name__}: {first}{where}"


def pick_device(name: str) -> Any:
    """The torch device of a setting; auto is a GPU when there is one.

    Raises:
        UserError: a GPU was asked for and there is none, or no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'unknown device "{name}"; type device=cpu, device=cuda or device=auto') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'device "{name}" was asked for and torch sees no CUDA device; type device=cpu or device=auto')
    return device


def describe(task: Any, cell: Cell) -> dict[str, Any]:
    """What the report must know of the task."""
    metric = task.spec.metrics[task.spec.primary]
    return dict(
        version=cell.task_version,
        id=task.id,
        primary=task.spec.primary,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        chance=None if math.isnan(task.spec.chance) else task.spec.chance,
        group=task.group,
        seeded=task.seeded,
    )


def header(cell: Cell) -> dict[str, Any]:
    """The fields that every record of a cell shares, whoever writes it."""
    return dict(
        names=cell.names,
        config=cell.parts,
        source_hash=cell.source_hash,
        precision=cell.budget.precision,
        plugins=cell.settings["plugins"],
        search=cell.settings["search"],
        **({} if cell.contents is None else {"contents": cell.contents}),
    )


def write(store: Store, record: dict[str, Any], cell: Cell, history: list[dict[str, float]]) -> None:
    """Write a record with its config and history."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_yaml(
        OmegaConf.create({**cell.parts, "seed": record["seed"], "learning_rate": record["learning_rate"]})
    )
    store.write(record, {"config.yaml": config, "history.csv": as_csv(history, HISTORY)})


def main() -> None:
    """Entry of the child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _die_with_parent()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    events = os.fdopen(job["events"], "w", encoding="utf-8", buffering=1)

    def emit(event: str, **data: Any) -> None:
        events.write(json.dumps({"event": event, **data}) + "\n")

    cell = Cell(**{**job["cell"], "replicas": [Replica(**r) for r in job["cell"]["replicas"]]})
    try:
        run(cell, [Replica(**r) for r in job["replicas"]], Store(Path(job["results"])), job["facts"], emit)
    except UserError as error:
        emit("fatal", reason=str(error), others_can_run=isinstance(error, ImpossibleCell))
        sys.exit(2)


def job(cell: Cell, replicas: list[Replica], store: Store, facts: dict[str, Any], events: int) -> str:
    """The line that `main` reads."""
    return json.dumps(
        dict(
            cell=dataclasses.asdict(cell),
            replicas=[dataclasses.asdict(replica) for replica in replicas],
            results=str(store.root),
            facts=facts,
            events=events,
        )
    )


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; `_end_with_parent` waits for the interpreter lock."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the parent closes the pipe or dies
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
