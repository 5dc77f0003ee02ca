"""Which suite a task belongs to, and what that implies for a command that names the task alone. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench.config import defaults, options
from bench.errors import UserError

AUTO = "auto"  # suite=auto: the one that the task belongs to
FALLBACK = "recall"
PUBLISHED = "_paper"  # how such suites end
KIN = {  # tasks whose data come from a hub, and the suite of their packaged relatives
    "tasks.byte_text.ByteText": "documents",
    "tasks.byte_retrieval.ByteRetrieval": "pairs",
    "tasks.grey_cifar10.GreyCIFAR10": "pixels",
}


def completed(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The overrides with what they leave open and their task decides.

    `suite=auto` becomes the suite of the task. A task without suite, pattern and backbone gets its suite's backbone, or
    that of the attention pattern that it is made for.

    Raises:
        UserError: several tasks that need different ones.
    """
    chosen = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    tasks = [name for name in re.split(r"[,\s]+", chosen.get("task", "")) if name in options("task", config_dir)]
    if chosen.get("suite") == AUTO:
        suite = _one("suite", {task: suite_of(task, config_dir) for task in tasks}) or FALLBACK
        overrides = [f"suite={suite}" if text == f"suite={AUTO}" else text for text in overrides]
        if not any(_made_for(task, config_dir) for task in tasks):
            return overrides
    elif "suite" in chosen:
        return list(overrides)
    if not tasks or chosen.keys() & {"pattern", "backbone"}:
        return list(overrides)
    backbone = _one("backbone", {task: backbone_of(task, config_dir) for task in tasks})
    return list(overrides) if backbone == defaults()["backbone"] else [*overrides, f"backbone={backbone}"]


def suite_of(task: str, config_dir: str | None = None) -> str:
    """The suite that names the task, else one of ours whose task is of the same class, else the first of all."""
    return named(task, config_dir) or FALLBACK


def named(task: str, config_dir: str | None = None) -> str | None:
    """`suite_of`, or None where no suite has the task or one of its class."""
    suites = {name: _brought(_read(path), "task") for name, path in options("suite", config_dir).items()}
    ordered = sorted(suites, key=lambda name: (name != FALLBACK, name))
    files = options("task", config_dir)
    own = _read(files[task]).get("_target_")
    for name in ordered:
        if task in suites[name]:
            return name
    for name in ordered:
        if name.endswith(PUBLISHED):  # at its published size a suite is for the rows that it names
            continue
        if any(_read(files[other]).get("_target_") == own for other in suites[name] if other in files):
            return name
    return KIN.get(str(own))


def backbone_of(task: str, config_dir: str | None = None) -> str:
    """The backbone that the pattern of a task, or its suite, brings."""
    if pattern := _made_for(task, config_dir):
        return _brought(pattern, "backbone")[0]
    brought = _brought(_read(options("suite", config_dir)[suite_of(task, config_dir)]), "backbone")
    return brought[0] if len(brought) == 1 else defaults()["backbone"]


def _made_for(task: str, config_dir: str | None) -> dict[str, Any] | None:
    """The YAML of the attention pattern that a task is made for."""
    patterns = (_read(path) for path in options("pattern", config_dir).values())
    return next((pattern for pattern in patterns if task in _brought(pattern, "task")), None)


def _one(what: str, by_task: dict[str, str]) -> str:
    """The value that all tasks share."""
    values = sorted(set(by_task.values()))
    if len(values) > 1:
        listed = ", ".join(f"{task}: {value}" for task, value in by_task.items())
        raise UserError(f"these tasks have no {what} in common ({listed}); type {what}=NAME")
    return values[0] if values else ""


def _brought(suite: dict[str, Any], part: str) -> list[str]:
    """Names of a group that a suite chooses, sweeps over, or leaves as they are."""
    names = [
        str(entry[key])
        for entry in suite.get("defaults", [])
        if isinstance(entry, dict)
        for key in entry
        if key == f"override /{part}"
    ]
    swept = ((suite.get("hydra") or {}).get("sweeper") or {}).get("params") or {}
    return re.split(r"[,\s]+", str(swept[part]).strip()) if part in swept else names or [defaults()[part]]


def _read(path: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    return content
