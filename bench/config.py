"""Configs: the typed budget, composing with Hydra, and one-line errors with the nearest valid name. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bench import folder, source
from bench.errors import UserError, nearest, unknown

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
GROUPS = ("task", "backbone", "attention", "budget", "pattern", "suite")
OPTIONAL = ("pattern", "suite")  # may be null
PARTS = ("task", "backbone", "attention", "budget")  # the groups that make a cell
SETTINGS = ("device", "jobs", "results", "retry", "plugins", "search")  # of a run; no result depends on them
TOP = (*GROUPS, *SETTINGS, "seed")
HYDRA = re.compile(
    r"hydra/launcher|hydra\.launcher\.\w+(\.\w+)*|hydra\.(verbose|mode)"
)  # of its settings, those for overrides
OPTIONAL = "max_epochs", "micro_batch_size"  # of the budget: null is to be without, and no part of a run's identity
SEARCHES = ("grid", "first_seed")  # of the learning rate: every rate for every seed, or for the first seed alone
STATUSES = ("ok", "diverged", "nan", "oom", "timeout", "unsupported", "error", "killed", "interrupted")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass
class Budget:
    """Training effort, equal for every mechanism of a leaderboard.

    Args:
        max_steps: optimiser steps; at most max_epochs times through train, where that is not null.
        batch_size: examples per step; eval_batch_size: per evaluation chunk; micro_batch_size: per pass through the
            model, whose gradients are summed over a step (null: all at once).
        learning_rates: peak rates; the grid is searched per mechanism, the choice falls on `valid`.
        warmup_steps: linear warm-up, then cosine to zero.
        eval_every: steps between evaluations on `valid`.
        stop_at: stop when the primary metric on `valid` reaches this, if higher is better; null: never.
        diverged_at: stop when the mean training loss since the last evaluation exceeds this multiple of the first loss.
        weight_decay, beta1, beta2: AdamW.
        max_grad_norm: clip the global gradient norm; null: no clipping.
        precision: float32 or bfloat16 (autocast).
        program: eager or compiled (torch.compile).
        time_limit_seconds: per replica, training and evaluation together.
    """

    max_steps: int = MISSING
    batch_size: int = MISSING
    learning_rates: list[float] = MISSING
    max_epochs: int | None = None
    warmup_steps: int = 0
    eval_every: int = 100
    eval_batch_size: int = 256
    micro_batch_size: int | None = None
    stop_at: float | None = None
    diverged_at: float = 10.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float | None = 1.0
    precision: str = "float32"
    program: str = "eager"
    time_limit_seconds: float = 3600.0

    def validate(self) -> None:
        """Raises UserError naming the first value that cannot be used."""
        for name in ("max_steps", "batch_size", "eval_every", "eval_batch_size", "time_limit_seconds", "diverged_at"):
            if not getattr(self, name) > 0:
                raise UserError(f"budget.{name} must be positive, got {getattr(self, name)}; nearest: 1")
        for name in OPTIONAL:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"budget.{name} must be positive or null, got {value}; nearest: 1")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"budget.{name} must not be negative, got {getattr(self, name)}; nearest: 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"budget.{name} must lie in [0, 1), got {getattr(self, name)}; nearest: 0.9")
        if not self.learning_rates:
            raise UserError("budget.learning_rates is empty; type for example budget.learning_rates=[0.001,0.003]")
        for rate in self.learning_rates:
            if not (rate > 0 and math.isfinite(rate)):
                raise UserError(f"budget.learning_rates must be positive and finite, got {rate}")
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise UserError(f"budget.learning_rates repeats a value: {list(self.learning_rates)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"budget.max_grad_norm must be positive or null, got {self.max_grad_norm}")
        for name, valid in (("precision", ("float32", "bfloat16")), ("program", ("eager", "compiled"))):
            if getattr(self, name) not in valid:
                raise unknown(f"budget.{name}", getattr(self, name), valid)

    def identity(self) -> dict[str, Any]:
        """The fields that a result depends on; the grid and the limit on time only decide which results there are."""
        without = {"learning_rates", "time_limit_seconds", *(name for name in OPTIONAL if getattr(self, name) is None)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in without}


ConfigStore.instance().store(group="budget", name="base_budget", node=Budget)


@dataclass
class Choice:
    """One composed configuration: resolved parts, their row names, and the settings of the run."""

    parts: dict[str, Any]
    names: dict[str, str]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)  # SETTINGS

    @property
    def budget(self) -> Budget:
        return Budget(**self.parts["budget"])


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Choice:
    """Compose one configuration without running it.

    Raises:
        UserError: an unknown name or key, a wrong type, a refused `_target_`.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from bench.suites import completed  # which itself needs this module

    overrides = completed(overrides, config_dir)
    check_overrides(overrides, config_dir)
    overrides = [*overrides, *([f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else [])]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    except Exception as error:
        raise explain(error, overrides, config_dir) from error
    return choice(config, config.hydra.runtime.choices, config.hydra.overrides.task)


def choice(config: DictConfig, choices: Any, overrides: Iterable[str]) -> Choice:
    """Check a composed config and take it apart; see `compose` for errors."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        resolved = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(resolved, dict)
    for key in resolved:
        if key not in TOP:
            raise unknown("key", str(key), TOP)
    settings = {key: resolved[key] for key in SETTINGS}
    check_settings(settings)
    plugins = settings["plugins"]
    for part in PARTS:
        source.check(resolved[part], plugins, part)
        if part != "budget" and "_target_" not in resolved[part]:
            raise UserError(f'{part} "{choices[part]}" has no _target_; write one in its YAML')
    for key in resolved["budget"]:
        if key not in (valid := [f.name for f in fields(Budget)]):
            raise unknown("key", f"budget.{key}", [f"budget.{name}" for name in valid])
    Budget(**resolved["budget"]).validate()
    names = {part: row_name(part, str(choices[part]), overrides) for part in PARTS}
    return Choice(parts={p: resolved[p] for p in PARTS}, names=names, seeds=seeds(resolved["seed"]), settings=settings)


def check_settings(settings: dict[str, Any]) -> None:
    """Raises UserError for a setting of the wrong type."""
    for key, example in (("device", "auto"), ("results", "results")):
        if not isinstance(settings[key], str) or not settings[key]:
            raise UserError(f"{key} must be a word, got {settings[key]!r}; type {key}={example}")
    for key, example in (("plugins", "my_package"), ("retry", "error")):
        if not isinstance(settings[key], list) or not all(isinstance(item, str) for item in settings[key]):
            raise UserError(f"{key} must be a list of words, got {settings[key]!r}; type {key}=[{example}]")
    for plugin in settings["plugins"]:
        if not plugin.isidentifier():
            raise UserError(f'plugins must be names of packages, got "{plugin}"; type plugins=[my_package]')
    for status in settings["retry"]:
        if status not in STATUSES:
            raise unknown("status in retry", status, STATUSES)
    if settings["search"] not in SEARCHES:
        raise unknown("search", settings["search"], SEARCHES)
    if isinstance(settings["jobs"], bool):
        raise UserError(f"jobs must be auto or a positive whole number, got {settings['jobs']}")


def seeds(value: Any) -> list[int]:
    """One seed or a list of seeds, as a list without repeats."""
    values = value if isinstance(value, list) else [value]
    for seed in values:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
            raise UserError(f"seed must be a whole number from 0 to {2**31 - 1} or a list of them, got {value!r}")
    if not values:
        raise UserError("seed is an empty list; type for example seed=[0,1,2]")
    return list(dict.fromkeys(values))


def row_name(part: str, name: str, overrides: Iterable[str]) -> str:
    """Name of a row: the YAML's, with what was changed in it: `sliding_window(window=32)`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    own = [text for text in overrides if text.lstrip("+~").startswith(f"{part}.")]
    changed = {  # values as Hydra writes them, so that a sweep names its rows like a single run
        override.key_or_group.removeprefix(f"{part}."): re.sub(
            r"\b(True|False)\b", lambda word: word[0].lower(), override.get_value_element_as_str()
        )
        for override in OverridesParser.create().parse_overrides(own)
    }
    written = _written(part, name) if changed else {}
    changed = {k: v for k, v in changed.items() if k not in written or str(written[k]).lower() != v.lower()}
    if part == "task" and "path" in changed:  # the name of the user's data, wherever they lie
        changed["path"] = Path(changed["path"].strip("'\"")).name
    if part == "budget":
        changed = {k: v for k, v in changed.items() if k not in ("learning_rates", "time_limit_seconds")}
    return f"{name}({','.join(f'{k}={v}' for k, v in sorted(changed.items()))})" if changed else name


def _written(part: str, name: str) -> dict[str, Any]:
    """The plain values in our YAML of a name: an override with the same value changes nothing."""
    path = options(part).get(name)
    content: Any = OmegaConf.to_container(OmegaConf.load(path)) if path else {}
    return {key: value for key, value in content.items() if not isinstance(value, (dict, list))}


def options(group: str, config_dir: str | None = None) -> dict[str, Path]:
    """Names of a group -> YAML files, the user's folder last."""
    folders = [CONF, *([Path(config_dir)] if config_dir else [])]
    return {path.stem: path for folder in folders for path in sorted((folder / group).glob("*.yaml"))}


def check_overrides(overrides: Sequence[str], config_dir: str | None = None) -> None:
    """Refuse what would escape the configuration before Hydra sees it: paths as names, foreign plug-in targets."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if config_dir is not None:
        folder.check(Path(config_dir), CONF, lambda text: check_overrides([text], None))
    parser = OverridesParser.create()
    for text in overrides:
        try:
            text.encode()
            override = parser.parse_override(text)
        except (HydraException, UnicodeEncodeError) as error:
            raise UserError(f"cannot read {text!a}: {str(error).splitlines()[0]}; type KEY=VALUE") from error
        key = override.key_or_group
        top = re.split(r"[./]", key)[0]
        if not key or "@" in key or override.package:
            raise UserError(f'cannot read "{text}": {key or "an empty name"} is no key; type KEY=VALUE')
        if override.is_delete() and top in TOP:
            raise UserError(f'"{text}": nothing can be taken out of a run; choose another value with {key}=VALUE')
        if key in GROUPS:
            for name in _names(override):
                if not (isinstance(name, str) and NAME.fullmatch(name)) and (name is not None or key not in OPTIONAL):
                    raise unknown(key, str(name), options(key, config_dir), _all_of(key))
        if top == "hydra" and (not HYDRA.fullmatch(key) or "_target_" in text or "${" in text):
            raise UserError(
                f'"{text}" is not for overrides; Hydra\'s own settings are left alone, but for hydra/launcher'
            )
        if (override.is_add() or override.is_force_add()) and top in TOP:
            raise UserError(f'"{text}" would add a key; every key there is exists already: type {text.lstrip("+")}')


def _names(override: Any) -> list[Any]:
    """The names that an override of a group chooses; a glob chooses among those that there are."""
    from hydra.core.override_parser.types import Glob

    value = override.value()
    if isinstance(value, Glob):
        return []
    return [getattr(name, "text", name) for name in (value.list if override.is_choice_sweep() else [value])]


def _all_of(group: str) -> str:
    return f"All of them: python -m bench.list {group}s" if group in GROUPS else ""


def explain(error: Exception, overrides: Sequence[str], config_dir: str | None = None) -> UserError:
    """Hydra's and OmegaConf's errors in one line with the nearest valid names; never the advice to add a `+`."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}\n{error.__cause__}"
    if found := re.search(r"Could not find '([\w/@]+)/([^']+)'", text) or re.search(
        r"In '[^']*': Could not find '([\w/@]+)/([^']+)'", text
    ):
        group, name = found.groups()
        return unknown(group, name, options(group, config_dir), _all_of(group))
    if found := re.search(r"Ambiguous value for argument '(([^=]+)=(.*))'", text):
        or_list = "" if found[2] in GROUPS else f"; for a list type {found[2]}=[{found[3]}]"
        return UserError(f'"{found[1]}" is a sweep, add -m to the command{or_list}')
    if found := re.search(r"Error merging override ([^=]+)=(.*)\n.*is not a ListConfig", text):
        return UserError(f"{found[1]} must be a list, got {found[2]}; type {found[1]}=[{found[2]}]")
    if found := re.search(r"Could not (?:override|append to config[^']*|delete from config[^']*)\W*'([^']+)'", text):
        return unknown("key", found[1], _keys(overrides, found[1], config_dir))
    if found := re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)'?", text):
        key = re.search(r"full_key: (\S+)", text)
        return unknown("key", key[1] if key else found[1], _keys(overrides, key[1] if key else found[1], config_dir))
    if found := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text):
        key = re.search(r"full_key: (\S+)", text)
        kind = {"Integer": "a whole number", "Float": "a number"}.get(found[2], found[2])
        return UserError(f'{key[1] if key else "value"} must be {kind}, got "{found[1]}"')
    return UserError(text.splitlines()[0] if text else type(error).__name__)


def _keys(overrides: Sequence[str], key: str, config_dir: str | None) -> list[str]:
    """All keys near `key`: the top level, and those of the chosen YAML when `key` is inside a group."""
    part = key.split(".")[0]
    if part not in PARTS:
        near = nearest(part, PARTS)[0] if "." in key else ""
        return _keys(overrides, f"{near}.{key.partition('.')[2]}", config_dir) if near else [*TOP]
    if part == "budget":
        return [f"budget.{f.name}" for f in fields(Budget)]
    chosen = [str(_default(part)), *_brought(overrides, part, config_dir)]
    chosen += [o.partition("=")[2] for o in overrides if o.startswith(f"{part}=")]
    files = options(part, config_dir)
    names: list[str] = []
    for name in re.split(r"[,\s]+", chosen[-1]):
        if name in files:
            names += [f"{part}.{k}" for k in map(str, OmegaConf.load(files[name])) if not k.startswith("_")]
    return names or [part]


def _brought(overrides: Sequence[str], part: str, config_dir: str | None) -> list[str]:
    """The YAMLs of a group that a chosen suite or pattern brings."""
    names = []
    for group in ("suite", "pattern"):
        files = options(group, config_dir)
        for chosen in [o.partition("=")[2] for o in overrides if o.startswith(f"{group}=")]:
            loaded: Any = OmegaConf.to_container(OmegaConf.load(files[chosen])) if chosen in files else {}
            entries = [entry for entry in loaded.get("defaults", []) if isinstance(entry, dict)]
            names += [str(entry[key]) for entry in entries for key in entry if key == f"override /{part}"]
    return names


def _default(part: str) -> str:
    entries: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml").defaults)
    return next((str(entry[part]) for entry in entries if isinstance(entry, dict) and part in entry), "")


def defaults() -> dict[str, str]:
    """The choices that conf/config.yaml makes: task, backbone, attention, budget."""
    return {part: _default(part) for part in PARTS}
