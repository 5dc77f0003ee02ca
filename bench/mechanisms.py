"""`python -m bench.mechanisms > docs/mechanisms.md`: what each mechanism is, where it stands and what it did.

Made from YAML, source and the committed leaderboards.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench import errors, source
from bench.config import ROOT, options
from bench.list import attentions

PAGE = ROOT / "docs" / "mechanisms.md"
MQAR = ROOT / "results" / "catalogue" / "leaderboards" / "mqar" / "leaderboard.csv"
RECALL = ROOT / "results" / "catalogue" / "leaderboards" / "patterns" / "index.csv"
SHORT = {"noncausal self": "NS", "causal self": "CS", "noncausal cross": "NC", "causal cross": "CC"}
COLUMNS = ["row", "what it is", "patterns", "presets of the same file", "sources", "MQAR", "four-pattern recall"]
NOT_MEASURED = "not measured"

HEAD = """# Mechanisms

Made by `python -m bench.mechanisms > docs/mechanisms.md` from `conf/attention`, the source and the committed
leaderboards; not to be edited.

Patterns: NS noncausal self, CS causal self, NC noncausal cross, CC causal cross. The last two columns are what was
found with `budget=small`: test accuracy on [MQAR]({mqar}) with its interval and rank, and the mean in each pattern of
[four-pattern recall]({recall}); the conditions stand on those pages, and *{not_measured}* where no committed run says.
A row marked ⚠ looks ahead in its causal form, as published: it has no rank there, its strict twin has. Parameters and
decode state: `python -m bench.list attentions`.
"""


def page(files: Mapping[str, Path], mqar: Path = MQAR, recall: Path = RECALL) -> str:
    """docs/mechanisms.md for the rows in `files`, with what two leaderboards say of them."""
    scores = _scores(mqar), _scores(recall)
    homes: dict[str, Path] = {}
    for name, path in files.items():
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        homes[name] = source.resolve(config["_target_"]).path
    links = (_link(path.with_suffix(".md")) for path in (MQAR, RECALL))
    parts = [HEAD.format(**dict(zip(("mqar", "recall"), links, strict=True)), not_measured=NOT_MEASURED)]
    rows = sorted(
        attentions(dict(files), []), key=lambda row: (row["family"], homes[row["attention"]], row["attention"])
    )
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [_entry(row, homes, files, scores) for row in rows if row["family"] == family]
        lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *own)]
        parts.append(f"## {family}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _entry(row: Mapping[str, str], homes: Mapping[str, Path], files: Mapping[str, Path], scores: Any) -> list[str]:
    """The cells of one row, COLUMNS."""
    name = row["attention"]
    home = homes[name]
    config: Any = OmegaConf.to_container(OmegaConf.load(files[name]), resolve=False)
    leaks = any(source.literal(source.resolve(target), "leaks", None) for target in source.targets(config))
    papers = [paper.strip() for paper in row["paper"].split(",")]
    links = [f"[{p}](https://{p.replace('arXiv:', 'arxiv.org/abs/')})" if "." in p else p for p in papers]
    own_tests = oracle_tests(home)
    links += [f"[{word}]({_link(path)})" for word, path in {"code": home, "YAML": files[name]}.items()]
    links += [f"[{'test' if len(own_tests) == 1 else test.stem}]({_link(test)})" for test in own_tests]
    presets = [f"`{other}`" for other in sorted(homes) if homes[other] == home and other != name]
    mqar, recall = found(name, *scores)
    patterns = " ".join(short for words, short in SHORT.items() if row[words] == "yes")
    return [
        f"**{name}**{' ⚠' if leaks else ''}",
        row["what"],
        patterns,
        ", ".join(presets),
        ", ".join(links),
        mqar,
        recall,
    ]


def found(name: str, mqar: Mapping[str, Mapping[str, str]], recall: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """What the leaderboards say of a mechanism: on MQAR, on recall by pattern."""
    row = recall.get(name, {})
    scores = {short: row.get(f"score_{words.replace(' ', '_')}") for words, short in SHORT.items()}
    parts = [f"{short} {float(score):.3f}" for short, score in scores.items() if score]
    return _result(mqar.get(name)), ", ".join(parts) or NOT_MEASURED


def _result(row: Mapping[str, str] | None) -> str:
    if row is None:
        return NOT_MEASURED
    if not row["test_mean"]:
        return f"{row['status']} ({row['reason']})"
    text = f"{float(row['test_mean']):.3f}"
    if row["test_low"]:
        text += f" [{float(row['test_low']):.3f}, {float(row['test_high']):.3f}]"
    if row["rank_best"]:
        best, worst = row["rank_best"], row["rank_worst"]
        text += f", rank {best}" if best == worst else f", rank {best}–{worst}"
    return text


def _scores(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a committed leaderboard by mechanism; none where there is no board."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["attention"]: row for row in csv.DictReader(file)}


def oracle_tests(home: Path) -> list[Path]:
    """The tests of a mechanism: the file of its name, else those of its family that import it, else all that do."""
    every = ROOT / "tests" / "attentions"
    folder = ROOT / "tests" / home.parent.relative_to(ROOT)
    if (own := folder / f"test_{home.stem}.py").exists():
        return [own]
    line = f"from {'.'.join(home.relative_to(ROOT).with_suffix('').parts)} import"
    found = [path for path in sorted(every.rglob("test_*.py")) if line in path.read_text(encoding="utf-8")]
    return [path for path in found if path.parent == folder] or found


def _link(path: Path) -> str:
    """From the page's folder."""
    return Path(os.path.relpath(path, PAGE.parent)).as_posix()


def main() -> None:
    print(page(options("attention")), end="")


if __name__ == "__main__":
    errors.run(main)
