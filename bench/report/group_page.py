"""A group of boards as Markdown, as CSV and as a table for the terminal; its plot is `group_plot`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.report import wording
from bench.report.group import BASELINE, Column, Group
from bench.report.leaderboard import Key
from bench.report.markdown import escape, table
from bench.report.statistics import LEVEL

if TYPE_CHECKING:
    from rich.table import Table

FEW = 5  # mechanisms; at four the 95 % interval of an SD reaches from 0.57 to 3.7 times the one found
FILES = "Numbers in full, with intervals, ranks and reasons: [index.csv](index.csv)."


def page(group: Group, links: Mapping[Key, str], plots: Mapping[str, str]) -> str:
    """index.md.

    Args:
        links: key of a board -> address of its page.
        plots: file name -> what it shows.
    """
    parts = [f"# {escape(title(group))}"]
    parts.append("\n".join(f"- **{heading}** {escape(text)}" for heading, text in conditions(group).items()))
    parts += [f"> **Note.** {escape(line)}" for line in warnings(group)]
    header, lines = summary(group)
    parts += ["## Composite index", table(header, lines, left={0, len(header) - 1}), FILES]
    if reasons := failures(group):
        header = ["pattern", "attention", "status", "reason"]
        parts += ["## Cells without a result", table(header, reasons, left={0, 1, 2, 3})]
    parts += [f"![{text}]({name})" for name, text in plots.items()]
    header, lines = boards(group)
    listed = [f"- {escape(c.label)}: [{escape(wording.title(c.board))}]({links[c.board.key]})" for c in group.columns]
    parts += ["## Boards and the reference set's numbers", "\n".join(listed), table(header, lines, left={0, 1})]
    parts += ["## What the columns are", "\n".join(f"- **{name}**: {text}" for name, text in columns(group).items())]
    return "\n\n".join(parts) + "\n"


def title(group: Group) -> str:
    return f"{group.key.group} · {group.key.budget}: composite index over {_count(group.patterns, 'pattern')}"


def conditions(group: Group) -> dict[str, str]:
    """The facts that hold for the whole page, by heading."""
    logs = f"; logarithm of {', '.join(group.logarithmic)}" if group.logarithmic else ""
    return {
        "Boards": ", ".join(f"{column.task} ({column.pattern})" for column in group.columns)
        + f"; backbone {', '.join(sorted({column.board.key.backbone for column in group.columns}))}",
        "Budget": wording.budget(group.key.budget, group.runs),
        f"Reference set ({len(group.reference)})": f"{named(group)}. z and the index are measured against the mean and "
        f"SD of these and of no others{logs}.",
        "Machine": wording.machine(group.runs),
    }


def named(group: Group) -> str:
    """The reference set in words."""
    return ", ".join(group.reference) or "empty, as no mechanism has a result with every seed in every board"


def caption(group: Group) -> str:
    """The conditions in a few short lines, for the plot."""
    facts = conditions(group)
    return f"reference set: {named(group)}\nbudget {facts['Budget']}\n{facts['Machine']}"


def warnings(group: Group) -> list[str]:
    """What a reader must know before comparing two rows, one line each."""
    lines = []
    why = group.constants.set_index(["pattern", "task", "metric"])["why"].to_dict()
    for column in group.columns:
        if reason := why.get(column.cell, "no mechanism has a result"):
            lines.append(f"No z in {column.label}: {reason}; the index leaves this board out for all.")
    if 2 <= len(group.reference) < FEW:
        lines.append(
            f"Only {len(group.reference)} mechanisms make the reference set: z depends much on which they are."
        )
    results = group.table[group.table["cells"] > 0].to_dict("records")
    part = [f"{row['attention']} ({coverage(row)})" for row in results if row["cells"] < row["cells_all"]]
    if part:
        lines.append(f"Index and rank are means over fewer boards, so these stand below the others: {', '.join(part)}.")
    hurt = [
        f"{row['attention']} in {column.label}"
        for row in results
        for column in group.columns
        if not wording.missing(row[f"score_{column.label}"]) and row[f"status_{column.label}"] != "ok"
    ]
    if hurt:
        lines.append(f"Seeds failed, and the mean of the others flatters: {', '.join(hurt)}.")
    return lines


def summary(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; trivial solvers and chance stand at the foot."""
    header = ["attention", "index", f"to {BASELINE}", "mean rank", "boards"]
    header += [column.label for column in group.columns] + [f"z {name}" for name in group.patterns] + ["note"]
    lines = [
        [
            row["attention"],
            index(row),
            z(row[f"to_{BASELINE}"]),
            wording.NOTHING if wording.missing(row["mean_rank"]) else f"{row['mean_rank']:.1f}",
            coverage(row),
            *(score(column, row) for column in group.columns),
            *(z(row[f"z_{name}"]) for name in group.patterns),
            "floor" if row["floor"] else "",
        ]
        for row in group.table.to_dict("records")
    ]
    solvers = dict.fromkeys(name for column in group.columns for name in column.board.solvers)
    blank, rest = [wording.NOTHING] * 4, [wording.NOTHING] * len(group.patterns)
    for name in solvers:
        own = [wording.number(c.board.solvers.get(name), c.board.fraction) for c in group.columns]
        lines.append([f"({name})", *blank, *own, *rest, "floor: trivial solver"])
    chance = [wording.number(c.board.measure.chance, c.board.fraction) for c in group.columns]
    if any(value != wording.NOTHING for value in chance):
        lines.append(["(chance)", *blank, *chance, *rest, "floor: guessing"])
    return header, lines


def index(row: dict[Any, Any]) -> str:
    """'+0.52 [+0.41, +0.63]'."""
    if wording.missing(row["composite"]) or wording.missing(row["composite_low"]):
        return z(row["composite"])
    return f"{z(row['composite'])} [{z(row['composite_low'])}, {z(row['composite_high'])}]"


def z(value: Any) -> str:
    """Two decimals with their sign."""
    return wording.NOTHING if wording.missing(value) else f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no minus zero


def coverage(row: dict[Any, Any]) -> str:
    """'3 of 4'."""
    return f"{row['cells']} of {row['cells_all']}"


def score(column: Column, row: dict[Any, Any]) -> str:
    """The mean over seeds, or the status."""
    value = row[f"score_{column.label}"]
    if wording.missing(value):
        return str(row[f"status_{column.label}"])
    return wording.number(value, column.board.fraction)


def failures(group: Group) -> list[list[str]]:
    """pattern, attention, status, reason of every cell without a result."""
    return [
        [column.label, row["attention"], row[f"status_{column.label}"], row[f"reason_{column.label}"]]
        for column in group.columns
        for row in group.table.sort_values("attention").to_dict("records")
        if wording.missing(row[f"score_{column.label}"])
    ]


def boards(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what each board measures and what the reference set has there."""
    known = group.constants.set_index(["pattern", "task", "metric"]).to_dict("index")
    lines = []
    for column in group.columns:
        own = known.get(column.cell, {})
        numbers = ["–" if wording.missing(own.get(name)) else f"{own[name]:.4g}" for name in ("mean", "sd")]
        chance = wording.number(column.board.measure.chance, column.board.fraction)
        lines.append([column.label, wording.metric(column.board), chance, *numbers, str(own.get("size", 0))])
    return ["pattern", "metric", "chance", "mean", "SD", "mechanisms"], lines


def columns(group: Group) -> dict[str, str]:
    """What each column is, for the foot of the page."""
    level = f"{LEVEL:.0%}".replace("%", " %")
    return {
        "index": "mean over patterns of the mean z over a pattern's boards (CAB, arXiv 2210.07661), with its "
        f"interval over seeds at {level}: Welch and Satterthwaite, mean and SD of the reference set taken as given. "
        "A board without a result is left out of the means and never imputed.",
        f"to {BASELINE}": f"the same means over the differences of z to {BASELINE}, in the boards that both have.",
        "mean rank": "over patterns, among the mechanisms with a result there; a rank is the middle of the ranks that "
        "the seeds leave possible in a board, so rows that cannot be told apart share it.",
        "boards": "with a result, of all.",
        "z": "distance of the score from the mean of the reference set in its sample SDs, larger is better; "
        "the mean over the pattern's boards.",
        "pattern": "score on test, mean over the seeds that succeeded at the learning rate chosen on valid; "
        "or the status.",
    }


def csv_table(group: Group) -> pd.DataFrame:
    """`group.table` with column names for programs: score_causal_self, z_causal_self, ..."""
    return group.table.rename(columns=lambda name: re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_"))


def terminal(group: Group) -> Table:
    """The table for the end of a run."""
    from rich.table import Table
    from rich.text import Text

    header, lines = summary(group)
    shown = Table(title=Text(title(group)), title_justify="left", box=None, pad_edge=False)
    wanted = range(5 + len(group.columns))  # without z and notes
    for i in wanted:
        if i == 0:  # the only one that may be cut in a narrow terminal
            shown.add_column(Text(header[i]), no_wrap=True)
        else:
            width = max(len(line[i]) for line in lines)
            shown.add_column(Text(header[i]), justify="right", min_width=width)
    for line in lines:
        shown.add_row(*(Text(line[i]) for i in wanted))
    shown.caption = Text("\n".join([f"reference set: {named(group)}", *warnings(group)]))
    shown.caption_justify = "left"
    return shown


def _count(things: list[str], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
