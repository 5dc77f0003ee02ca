"""Overrides with sweeps (`attention=softmax,based`, `suite=recall`) to configurations, without Hydra's application."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.config import CONF, Choice, check_overrides, choice, explain
from bench.suites import completed


def seeds_as_one(text: str) -> str:
    """`seed=0,1,2` as the list seed=[0,1,2]: seeds are replicas of one cell, not jobs of their own."""
    if found := re.fullmatch(r"seed=(\d+(?:,\d+)+)", text):
        return f"seed=[{found[1]}]"
    if found := re.fullmatch(r"seed=range\((\d+)(?:,(\d+))?\)", text):
        first, last = (0, int(found[1])) if found[2] is None else (int(found[1]), int(found[2]))
        return f"seed=[{','.join(map(str, range(first, last)))}]"
    return text


def expand(overrides: Sequence[str], config_dir: str | None = None) -> list[Choice]:
    """Every configuration of a sweep, as `python -m bench -m` would compose them.

    Raises:
        UserError: as `bench.config.compose`.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = completed([seeds_as_one(text) for text in overrides], config_dir)
    check_overrides(overrides, config_dir)
    overrides += [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            loader = GlobalHydra.instance().config_loader()
            parser = OverridesParser.create(config_loader=loader)
            fixed = [text for text in overrides if not parser.parse_override(text).is_sweep_override()]
            params = compose("config", overrides=fixed, return_hydra_config=True).hydra.sweeper.get("params") or {}
            named = {parser.parse_override(text).key_or_group for text in overrides}
            swept = [f"{key}={value}" for key, value in params.items() if key not in named]
            jobs = BasicSweeper.split_arguments(parser.parse_overrides([*swept, *overrides]), None)[0]
            configs = [compose("config", overrides=list(job), return_hydra_config=True) for job in jobs]
    except Exception as error:
        raise explain(error, overrides, config_dir) from error
    return [choice(config, config.hydra.runtime.choices, config.hydra.overrides.task) for config in configs]
