"""The user's folder of configs, `--config-dir`: read as data before Hydra reads it.

Hydra imports what its own settings name (callbacks, logging, launchers) before any job is composed, and a YAML can
reach those settings through `# @package _global_`. So a file may only say which parts make a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.errors import UserError

SWEEP = {"mode": None, "sweeper": {"params": None}}  # what a suite may say under `hydra`


def check(folder: Path, ours: Path, check_override: Callable[[str], None]) -> None:
    """Check every YAML file of a folder, whether a run would use it or not.

    Args:
        ours: the project's own folder, whose names are taken.
        check_override: refuses an override; sees what a suite sweeps over.

    Raises:
        UserError: no such folder, a name that is taken, a file that reaches for more than the parts of a run.
    """
    if not folder.is_dir():
        raise UserError(f"--config-dir: there is no folder {folder}")
    for link in (path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()):
        raise UserError(f"{link}: a folder of configs may not hold a link to another folder")
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        where = path.relative_to(folder)
        if (ours / where).exists():
            raise UserError(f"{path}: the name {where.with_suffix('')} is taken; give the file another")
        try:
            text = path.read_text(encoding="utf-8")
            content = yaml.safe_load(text) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        if where.parts[0] == "hydra" or not isinstance(content, Mapping):
            raise UserError(
                f"{path}: a file must describe a task, backbone, attention, budget, pattern or suite as `key: value`"
            )
        for package in re.findall(r"^\s*#\s*@package(.*)", text, re.MULTILINE):
            if package.strip() != "_global_":
                raise UserError(f"{path}: @package may only be _global_, got {package.strip()}")
        if "plugins" in content:
            raise UserError(f"{path}: plugins are named on the command line only; type plugins=[my_package] there")
        for entry in content.get("defaults") or []:
            if any(word in str(entry) for word in ("hydra", "@", "..", "plugins")):
                raise UserError(f"{path}: the defaults list may only choose parts of a run, got {entry}")
        _check_hydra(path, content.get("hydra", {}), SWEEP)
        for key, value in _params(content).items():
            if str(key).startswith(("plugins", "hydra")):
                raise UserError(f"{path}: a suite sweeps over parts, their keys and seeds, got {key}")
            check_override(f"{key}={value}")


def _check_hydra(path: Path, found: Any, allowed: Mapping[str, Any]) -> None:
    """Only the keys of `allowed`, nested; an interpolation in place of a mapping could stand for anything."""
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: under hydra only mode and sweeper.params can be set, got {found!r}")
    for key, value in found.items():
        if key not in allowed:
            raise UserError(f"{path}: under hydra only mode and sweeper.params can be set, got {key}")
        if allowed[key] is not None:
            _check_hydra(path, value, allowed[key])


def _params(content: Mapping[str, Any]) -> Mapping[str, Any]:
    params = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    return params if isinstance(params, Mapping) else {str(params): ""}
