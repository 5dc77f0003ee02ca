"""`python -m bench.examples [TASK ...] [--to docs/tasks]`: what each task is, with pictures of example inputs.

Prints docs/tasks.md, of all rows of conf/task or of those that are named. With --to FOLDER it draws FOLDER/TASK.png,
and writes FOLDER.md where no row is named. Takes minutes: data and floors are made, and remembered on this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench import atomic, errors, source, suites
from bench.config import ROOT, options
from bench.errors import unknown
from bench.list import comment, tasks

FOLDER = ROOT / "docs" / "tasks"
SECTIONS = {  # title -> modules of tasks, in order
    "Recall and skills": (
        *("mqar", "mqar_compositional", "mqar_continuous", "mqar_forgetting", "mqar_read_twice"),
        *("recall", "mad", "induction", "disjoint_sets"),
    ),
    "Long Range Arena": ("listops", "pathfinder", "byte_text", "byte_retrieval", "grey_cifar10"),
    "Language modeling": ("lm", "mlm"),
    "Classification of texts and tunes": (
        *("sentiment_snippets", "trec6", "abc_metre", "snippet_documents", "question_pairs", "dialogue_pairs"),
    ),
    "Images as pixels": ("digits", "digits_continuous", "mnist5k"),
    "Sensor series": ("sensors",),
    "Forecasting": ("forecasting",),
    "More": (),
}
LARGE = "_lra", "_s4", "_paper", "_large", "_zoology", "_iclr24", "_based_mix", "_mad", "pathfinder32", "pathx"
PRIVATE = "not to be passed on"  # in a licence: no picture for the page
ELSEWHERE = {
    "digits": "scikit-learn's digits, of UCI, CC BY 4.0; in its package",
    "digits_continuous": "scikit-learn's digits, of UCI, CC BY 4.0; in its package",
    "stdlib": "the source files of the Python that runs; PSF licence",
    "enwik8": "a file of yours: enwik8, the first 100 MB of Wikipedia as XML, CC BY-SA; task.path=FILE",
    "text": "a file or folder of yours; task.path=FOLDER",
    "ecl": "a CSV file of yours: ECL, electricity of 321 clients; task.path=FILE",
    "wth": "a CSV file of yours: WTH, of Informer's authors; task.path=FILE",
}

HEAD = """# Tasks

Made by `python -m bench.examples --to docs/tasks` from `conf/task`, the data on the machine and the trivial solvers;
not to be edited.

Each small row has a picture of examples of `test` and numbers: examples are those of seed 0, lengths count positions,
*floors* are trivial solvers fitted on train, *references* solvers that go a part of the way or are given more; both are
measured on `test`.
Rows at published or larger sizes (their names end in {large})
and rows whose data are not packaged are listed below each section, without numbers. Data that may not be passed on have
no picture here; `python -m bench.examples TASK --to FOLDER` draws one on your machine.

To run a row: `make bench TASK=listops`. Real data are brought once, by `python -m bench.data fetch NAME`;
`python -m bench.data sources` lists them with size and licence, `python -m bench.list suites` the suites.
"""


def page(names: Sequence[str], pictures: Path | None = None, private: bool = False) -> str:
    """docs/tasks.md for rows of conf/task.

    Args:
        pictures: folder that they are drawn into; None: none are.
        private: draw also what may not be passed on.
    """
    files = options("task")
    rows = {row["task"]: row for row in tasks({name: files[name] for name in names}, [])}
    parts = [HEAD.format(large=", ".join(f"`{ending}`" for ending in LARGE))] if len(names) == len(files) else []
    for title, modules in SECTIONS.items():
        own = [name for name in names if section(files[name]) == title]
        own.sort(key=lambda name: (modules.index(module(files[name])) if modules else 0, name))
        if not own:
            continue
        parts.append(f"## {title}\n")
        listed = []
        for name in own:
            task = None if name.endswith(LARGE) else made(name)
            if task is None:
                listed.append(name)
            else:
                parts.append(entry(name, task, pictures, private))
        if listed:
            lines = ["| row | id | what it is | data |", "| --- | --- | --- | --- |"]
            for name in listed:
                task = made(name)
                begins = rows[name]["id begins"]
                identity = f"{begins}{'' if '/' in begins else '/'}..." if task is None else task.id
                cells = (f"**{name}**", f"`{identity}`", comment(files[name]), data(name, brief=True))
                lines.append(f"| {' | '.join(cells)} |")
            parts.append(
                ("### Larger, published, or with data of yours\n\n" if own != listed else "") + "\n".join(lines) + "\n"
            )
    return "\n".join(parts)


def entry(name: str, task: Any, pictures: Path | None = None, private: bool = False) -> str:
    """What a small task is: picture, kind, sizes, floors, data, how it is run."""
    from tasks.base import SPLITS

    splits = {split: task.segments(split, 0) for split in SPLITS}
    hashes = {split: [segment.sha256() for segment in segments] for split, segments in splits.items()}
    solved = task.floors(splits, hashes)
    spec = task.spec
    files = options("task")
    drawn = ""
    if pictures is not None and (private or PRIVATE not in data(name)):
        from bench.report.example_inputs import picture

        if png := picture(name, task, splits["test"]):
            pictures.mkdir(parents=True, exist_ok=True)
            atomic.replace(pictures / f"{name}.png", png)
            drawn = f"![examples of {name}]({pictures.name}/{name}.png)\n\n"
    counts = [f"{sum(map(len, task.unrepeated(splits[split]))):,}" for split in SPLITS]
    references = {key: value for key, value in solved.items() if key in task.references}
    floors = {key: value for key, value in solved.items() if key not in task.references}
    metric = spec.metrics[spec.primary]
    unit = "" if metric.unit == spec.primary.replace("_", " ") else f"{metric.unit}; "
    better = "" if metric.higher_is_better else f" ({unit}lower is better)"
    scores = [f"chance {spec.chance:.3f}"]
    scores += [f"{word} {listed(found)}" for word, found in (("floors:", floors), ("references:", references)) if found]
    twins = [
        other
        for other, path in files.items()
        if other != name and target(path) == target(files[name]) and (other.endswith(LARGE) or made(other) is None)
    ]
    run = command(name)
    if twins:
        run += f"; larger or published: {', '.join(twins)}"
    lines = [
        f"`{task.id}`, version {task.version}: {kind(spec)}; {' / '.join(counts)} examples in {' / '.join(SPLITS)}",
        f"{spec.primary}{better}: {'; '.join(scores)}",
        f"data: {data(name)}",
        run,
    ]
    return f"### {name}\n\n{comment(files[name])}\n\n{drawn}" + "".join(f"- {line}\n" for line in lines)


def command(name: str) -> str:
    """How a row is run, and what that brings."""
    for pattern, path in options("pattern").items():
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
        chosen = {key: value for each in config["defaults"] if isinstance(each, dict) for key, value in each.items()}
        if chosen.get("override /task") == name:
            return f"`make bench PATTERN={pattern}`; suite `patterns`, backbone `{chosen['override /backbone']}`"
    return f"`make bench TASK={name}`; suite `{suites.suite_of(name)}`, backbone `{suites.backbone_of(name)}`"


def kind(spec: Any) -> str:
    """Inputs, length and output in words."""
    from tasks.base import PerSequence, Reconstruction, Tokens, Values

    def stream(values: Any) -> str:
        if isinstance(values, Tokens):
            return f"tokens of {values.vocab_size:,}"
        return f"vectors of {values.dim}" if values.dim > 1 else "real numbers"

    text = f"{stream(spec.inputs)}, up to {spec.length:,} positions"
    if spec.grid:
        text += f" on a grid of {' x '.join(map(str, spec.grid))}"
    if spec.context is not None:
        text += f", with a second sequence of {stream(spec.context)}, up to {spec.context_length:,}"
    out = spec.output
    if isinstance(out, Values):
        return f"{text} → {out.num_values} {'number' if out.num_values == 1 else 'numbers'} at each step ahead"
    where = "for the whole" if isinstance(out, PerSequence) else "at every labelled position"
    if isinstance(out, Reconstruction):
        where = "at every position, from the last state"
    return f"{text} → a class of {out.num_classes:,} {where}; {'causal' if spec.causal else 'noncausal'}"


def data(name: str, brief: bool = False) -> str:
    """Where the data of a row come from."""
    from tasks import sources

    path = options("task")[name]
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    keys = config.get("data"), config.get("corpus"), source.literal(target(path), "source"), module(path)
    for key in keys:
        if key in ELSEWHERE:
            return ELSEWHERE[key]
        if key in sources.SOURCES:
            found = sources.SOURCES[key]
            fetch = f"`python -m bench.data fetch {key}`"
            return (
                fetch if brief else f"{found.title} ({found.origin.num_bytes / 1e6:,.1f} MB; {found.licence}); {fetch}"
            )
    return "generated"


def made(name: str) -> Any:
    """The task of a row; None where its data are not on this machine."""
    from bench.cell import ImpossibleCell, make_task
    from tasks.sources import MissingData

    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(options("task")[name]))
        return make_task(config)
    except ImpossibleCell as error:
        if isinstance(error.__cause__.__cause__ if error.__cause__ else None, MissingData):
            return None
        raise


def module(path: Path) -> str:
    return target(path).module.rpartition(".")[2]


def section(path: Path) -> str:
    """The title that a task stands under."""
    return next((title for title, modules in SECTIONS.items() if module(path) in modules), "More")


def target(path: Path) -> source.Target:
    config: Any = OmegaConf.load(path)
    return source.resolve(config["_target_"])


def listed(numbers: Any) -> str:
    return " · ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.examples", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="rows of conf/task; none: all of them")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write pictures there, and the page beside it")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        if name not in options("task"):
            raise unknown("task", name, options("task"))
    text = page(arguments.tasks or list(options("task")), arguments.to, private=bool(arguments.tasks))
    if arguments.to is None or arguments.tasks:
        print(text, end="")
    else:
        atomic.replace(arguments.to.with_suffix(".md"), text.encode())


if __name__ == "__main__":
    errors.run(main)
