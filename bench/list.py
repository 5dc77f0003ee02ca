"""`python -m bench.list [GROUP ...]`: what there is, from source and YAML; `attentions` alone is measured, too."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench import errors, source
from bench.config import GROUPS, Budget, defaults, options
from bench.errors import UserError, unknown

PATTERN_WORDS = {
    "NONCAUSAL_SELF": "noncausal self",
    "CAUSAL_SELF": "causal self",
    "NONCAUSAL_CROSS": "noncausal cross",
    "CAUSAL_CROSS": "causal cross",
}
SHORTHAND = {
    "SELF": ("NONCAUSAL_SELF", "CAUSAL_SELF"),
    "CROSS": ("NONCAUSAL_CROSS", "CAUSAL_CROSS"),
    "ALL": tuple(PATTERN_WORDS),
}


def patterns(text: str) -> set[str]:
    """Names of the single patterns in the source text of a `patterns` attribute."""
    names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    return {single for name in names for single in SHORTHAND.get(name, (name,)) if single in PATTERN_WORDS}


def comment(path: Path) -> str:
    """The first comment of a YAML: the sentence that says what it is."""
    lines = (
        line.lstrip("# ").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )
    return next((line for line in lines if not line.startswith("@package")), "")


def attentions(files: dict[str, Path], plugins: list[str]) -> list[dict[str, str]]:
    """One row per mechanism: family, patterns, papers. A hybrid has what all of its layers have."""
    rows = []
    for name, path in files.items():
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        outer = source.resolve(config["_target_"], plugins)
        leaves = [source.resolve(t, plugins) for t in source.targets(config)]
        leaves = [target for target in leaves if source.constant(target, "patterns")] or [outer]
        sets = [patterns(source.constant(leaf, "patterns") or "") for leaf in leaves]
        common = set.intersection(*sets)
        links = (source.literal(leaf, "paper", "") for leaf in leaves)
        papers = dict.fromkeys(link.removeprefix("https://").replace("arxiv.org/abs/", "arXiv:") for link in links)
        rows.append(
            {
                "attention": name,
                "family": outer.family,
                **{words: "yes" if key in common else "-" for key, words in PATTERN_WORDS.items()},
                "what": comment(path),
                "paper": ", ".join(papers),
            }
        )
    return rows


def catalogue(files: dict[str, Path], plugins: list[str]) -> list[dict[str, str]]:
    """The rows of `attentions` with what one layer of each costs, measured: this one imports torch."""
    import torch
    from hydra.utils import instantiate

    from bench.catalogue import ALLOWED, LENGTHS, measure
    from bench.config import CONF

    torch.set_num_threads(1)
    rows = attentions(files, plugins)
    softmax = instantiate(OmegaConf.load(CONF / "attention" / "softmax.yaml"), _convert_="all")
    for row in rows:
        what, paper = row.pop("what"), row.pop("paper")
        entry = measure(instantiate(OmegaConf.load(files[row["attention"]]), _convert_="all"), softmax)
        states = entry.state_bytes or [None for _ in LENGTHS]
        row["parameters"] = f"{entry.parameters:.2f}{' !' if entry.parameters > ALLOWED else ''}"
        row |= {f"state at {n}": "-" if size is None else f"{size:,}" for n, size in zip(LENGTHS, states, strict=True)}
        row |= {"complexity": entry.complexity, "runs on": entry.runs_on, "what": what, "paper": paper}
    return rows


def tasks(files: dict[str, Path], plugins: list[str]) -> list[dict[str, str]]:
    """One row per task preset: how its id begins (the rest may depend on data), version and what it is."""
    rows = []
    for name, path in files.items():
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        target = source.resolve(config["_target_"], plugins)
        protocol = str(config.get("protocol") or config.get("pattern") or "")
        identity = "/".join(filter(None, [source.literal(target, "name", ""), protocol]))
        version = str(source.literal(target, "version", "-"))
        rows.append({"task": name, "id begins": identity, "version": version, "what": comment(path)})
    return rows


def backbones(files: dict[str, Path], plugins: list[str]) -> list[dict[str, str]]:
    """One row per backbone preset: slots and shape."""
    rows = []
    for name, path in files.items():
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        target = source.resolve(config["_target_"], plugins)
        slots = source.constant(target, "slots") or ""
        names = re.findall(r"'(\w+)': Pattern\.(\w+)", slots)
        rows.append(
            {
                "backbone": name,
                "slots": ", ".join(f"{slot} ({PATTERN_WORDS.get(p, p)})" for slot, p in names),
                "layers": str(config.get("num_layers", "-")),
                "dim": str(config.get("dim", "-")),
                "heads": str(config.get("num_heads", "-")),
                "what": comment(path),
            }
        )
    return rows


def budgets(files: dict[str, Path], plugins: list[str]) -> list[dict[str, str]]:
    """One row per budget."""
    rows = []
    for name, path in files.items():
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        budget = Budget(**{key: value for key, value in config.items() if key != "defaults"})
        rows.append(
            {
                "budget": name,
                "steps": str(budget.max_steps),
                "batch": str(budget.batch_size),
                "learning rates": " ".join(f"{rate:g}" for rate in budget.learning_rates),
                "precision": budget.precision,
                "what": comment(path),
            }
        )
    return rows


def suites(files: dict[str, Path], plugins: list[str]) -> list[dict[str, str]]:
    """One row per named sweep."""
    return [{"suite": name, "what": comment(path)} for name, path in files.items()]


def patterned(files: dict[str, Path], plugins: list[str]) -> list[dict[str, str]]:
    """One row per pattern: the task and the backbone that it chooses."""
    rows = []
    for name, path in files.items():
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        chosen = {key.removeprefix("override /"): value for entry in config["defaults"] for key, value in entry.items()}
        rows.append({"pattern": name, **chosen, "what": comment(path)})
    return rows


TABLES = dict(
    attentions=attentions, tasks=tasks, backbones=backbones, budgets=budgets, patterns=patterned, suites=suites
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.list", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="GROUP", help=f"{', '.join(TABLES)}; plugins=[my_pkg]")
    parser.add_argument("--config-dir", help="folder with YAMLs of your own")
    arguments = parser.parse_intermixed_args()
    plugins = [name for word in arguments.words if "=" in word for name in re.findall(r"\w+", word.partition("=")[2])]
    groups = [word for word in arguments.words if not word.startswith("plugins=")] or list(TABLES)
    for group in groups:
        if group not in TABLES:
            raise unknown("group", group, TABLES)
        if arguments.config_dir and not Path(arguments.config_dir).is_dir():
            raise UserError(f"--config-dir: there is no folder {arguments.config_dir}")
        assert group[:-1] in GROUPS
        files = options(group[:-1], arguments.config_dir)
        measured = groups == ["attentions"]
        show(group, (catalogue if measured else TABLES[group])(files, plugins))
        if measured:
            from bench.catalogue import ALLOWED, CONDITIONS

            print(f"Measured on {CONDITIONS}, in bytes; ! marks more than {ALLOWED - 1:.0%} above.")
            print("Complexity per head and channel, T queries and S keys. No kernels of ours yet; GPU: not measured.")


def show(title: str, rows: list[dict[str, str]]) -> None:
    """Print rows as an aligned table; wide columns fold in a terminal and never in a pipe."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
    default = defaults().get(title[:-1])
    table = Table(title=f"{title} ({len(rows)}; default: {default})" if default else f"{title} ({len(rows)})", box=None)
    table.title_justify = "left"
    for column in rows[0] if rows else []:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console.print(table)


if __name__ == "__main__":
    errors.run(main)
