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


def completed(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The overrides with what they leave open and their task decides.

    `suite=auto` becomes the suite of the task. A task without suite, pattern and backbone gets its suite's backbone.

    Raises:
        UserError: several tasks that need different ones.
    """
    named = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    tasks = [name for name in re.split(r"[,\s]+", named.get("task", "")) if name in options("task", config_dir)]
    if named.get("suite") == AUTO:
        suite = _one("suite", {task: suite_of(task, config_dir) for task in tasks}) or FALLBACK
        return [f"suite={suite}" if text == f"suite={AUTO}" else text for text in overrides]
    if not tasks or named.keys() & {"suite", "pattern", "backbone"}:
        return list(overrides)
    backbone = _one("backbone", {task: backbone_of(task, config_dir) for task in tasks})
    return list(overrides) if backbone == defaults()["backbone"] else [*overrides, f"backbone={backbone}"]


def suite_of(task: str, config_dir: str | None = None) -> str:
    """The suite that names the task, else one whose task is of the same class, else the first of all."""
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
        if any(_read(files[other]).get("_target_") == own for other in suites[name] if other in files):
            return name
    return None


def backbone_of(task: str, config_dir: str | None = None) -> str:
    """The backbone that a task's suite brings."""
    brought = _brought(_read(options("suite", config_dir)[suite_of(task, config_dir)]), "backbone")
    return brought[0] if len(brought) == 1 else defaults()["backbone"]


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
