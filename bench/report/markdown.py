"""A board as Markdown that reads well on GitHub and as plain text, and as a table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report import slices, wording
from bench.report.leaderboard import Board
from bench.report.recall_gap import recall_gaps
from bench.report.statistics import LEVEL

if TYPE_CHECKING:
    from rich.table import Table

FILES = "Exact values: [leaderboard.csv](leaderboard.csv); all runs, scores and curves: `runs`, `scores`, `history`."
GAP = (
    "Nats per token of test: over all, where the context has shown the n-gram that train hardly has (AR hits: "
    "{hits:,.0f} tokens, {share}), and elsewhere. The share says how much of what a mechanism lacks to softmax it "
    "lacks at hits; a share equal to theirs among tokens is what a gap without recall would give, and above 1 it is "
    "the better one elsewhere."
)
NO_RECALL = (
    "Softmax itself loses more at hits than elsewhere: it has not learned to recall within this budget, so the shares "
    "say nothing of who can."
)
SOLVED = "solved"
NOTE_LENGTH = 60  # characters of a reason in the ranking; the whole line stands under "Runs without a result"


def page(board: Board, plots: dict[str, str]) -> str:
    """leaderboard.md; `plots`: file name -> what it shows, in the order of the page."""
    parts = [f"# {escape(wording.title(board))}"]
    if len(board.runs):
        facts = wording.conditions(board)
        parts.append("\n".join(f"- **{heading}** {escape(text)}" for heading, text in facts.items()))
        parts += [f"> **Note.** {escape(line)}" for line in wording.warnings(board)]
        header, lines = ranking(board)
        parts += ["## Ranking", table(header, lines, left={1, 3, len(header) - 1}), FILES]
    else:
        parts.append("No run of this board counts: all of them are set aside, see below.")
    for key, kind in slices.kinds(board.slices).items():
        if len(slices.values(board.slices, key)) <= kind.table:
            heading = f"## {escape(f'{wording.heading(board.metric)} by {kind.label}')}"
            parts += [heading, "Test, mean over seeds.", table(*slice_table(board, key), left={0})]
    parts += recall_gap(board)
    if len(board.costs):
        parts += ["## Cost", table(*costs(board), left={0, 7})]
    if lines := wording.failures(board):
        header = ["attention", "status", "runs", "learning rates", "seeds", "most frequent reason"]
        parts += ["## Runs without a result", table(header, lines, left={0, 1, 3, 4, 5})]
    if len(board.set_aside):
        aside = [[str(value) for value in row] for row in board.set_aside.itertuples(index=False)]
        parts += ["## Not counted", table(["attention", "why", "runs"], aside, left={0, 1})]
    if plots:
        parts += ["## Plots", *(f"![{text}]({name})" for name, text in plots.items())]
    if len(board.runs):
        parts += [
            "## What the columns are",
            "\n".join(f"- **{name}**: {text}" for name, text in columns(board).items()),
        ]
    return "\n\n".join(parts) + "\n"


def ranking(board: Board) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the ranking; trivial solvers and chance stand under the ranked rows.

    A column for solved seeds only where the metric has a ceiling.
    """
    lines = [_line(board, row) for row in board.table.to_dict("records")]
    floors = [
        (name, value, "reference: given more, or a part of the answer") for name, value in board.references.items()
    ]
    floors += [(name, value, "floor: trivial solver") for name, value in board.solvers.items()]
    if not wording.missing(board.measure.chance):
        floors.append(("chance", board.measure.chance, "floor: guessing"))
    none, under = wording.NOTHING, len(board.ranked)
    lines[under:under] = [
        [none, f"({name})", wording.number(value, board.fraction), *[none] * 4, note] for name, value, note in floors
    ]
    score = f"test {wording.named(board.metric)}"
    header = ["rank", "attention", score, "every seed", SOLVED, "valid", "learning rate", "note"]
    if not board.measure.solvable:
        lines = [[cell for name, cell in zip(header, line, strict=True) if name != SOLVED] for line in lines]
        header.remove(SOLVED)
    return header, lines


def _line(board: Board, row: Any) -> list[str]:
    note = wording.note(row)
    return [
        wording.rank(row),
        row["attention"],
        wording.score(board, row),
        wording.every_seed(board, row),
        wording.solved(row),
        wording.number(row["valid_mean"], board.fraction),
        wording.rate(row),
        note if len(note) <= NOTE_LENGTH else note[: NOTE_LENGTH - 1].rstrip() + "…",
    ]


def costs(board: Board) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the cost table, a line per mechanism and device; the device last, where they differ."""
    lengths = board.costs["state_length"].dropna().unique()
    at = f" at {lengths[0]:g} tokens" if len(lengths) == 1 else ""
    header = ["attention", "parameters", f"state{at}", "steps", "tokens/s", "decode ms/token", "peak memory", "device"]
    lines = [
        [
            row["attention"],
            wording.size(row["num_parameters"]),
            wording.size(row["state_bytes"], "B"),
            wording.size(row["steps"]),
            wording.size(row["tokens_per_second"]),
            wording.size(row["decode_ms_per_token"]),
            wording.size(row["peak_memory_bytes"], "B"),
            row["device"],
        ]
        for attention in board.ranked
        for row in board.costs[board.costs["attention"] == attention].to_dict("records")
    ]
    if board.costs["device"].nunique() > 1:
        return header, lines
    return header[:-1], [line[:-1] for line in lines]


def slice_table(board: Board, key: str) -> tuple[list[str], list[list[str]]]:
    """Ranked mechanisms × slices of one kind."""
    part = board.slices[board.slices["slice_key"] == key]
    names = slices.values(part, key)
    value = part.set_index(["attention", "slice_value"])["mean"].to_dict()
    fraction = board.fraction
    lines = [[a, *(wording.number(value.get((a, name)), fraction) for name in names)] for a in board.ranked]
    return ["attention", *map(slices.shown, names)], lines


def recall_gap(board: Board) -> list[str]:
    """The section on the gap to softmax and the share of AR hits in it; nothing where no token is a hit.

    Who looks ahead needs no recall, and is left out.
    """
    gaps = recall_gaps(board.runs[board.runs["attention"].isin(board.ranked)], board.frames.scores)
    if gaps.empty:
        return []
    text = GAP.format(hits=gaps["hits"].iloc[0], share=f"{gaps['hit_tokens'].iloc[0]:.1%}".replace("%", " %"))
    reference = gaps[gaps["attention"] == "softmax"]
    if (reference["hit_loss"] >= reference["other_loss"]).any():
        text += f" {NO_RECALL}"
    header = ["attention", "loss", "at hits", "elsewhere", "gap", "share of hits in the gap"]
    losses = ["loss", "hit_loss", "other_loss", "gap"]
    lines = [
        [str(row["attention"]), *(wording.number(row[name], False) for name in losses), wording.number(row["share"])]
        for row in gaps.to_dict("records")
    ]
    return ["## Recall in the gap to softmax", text, table(header, lines, left={0})]


def columns(board: Board) -> dict[str, str]:
    """What each column is, for the foot of the page."""
    level = f"{LEVEL:.0%}".replace("%", " %")
    if board.measure.solvable:
        threshold = f"{board.measure.solved:g}"
        solved = (
            f"share of all seeds with {wording.named(board.metric)} of at least {threshold}, with the Wilson interval "
            f"at {level}; "
            "a failed seed has not solved it."
        )
        below = f", and valid is below {threshold}"
    else:
        solved, below = "", ""
    texts = {
        "rank": f"every rank that the seeds leave possible for this row at {level} (Welch's test against each other "
        "row, Holm's correction over them). Rows that the seeds cannot tell apart share ranks; "
        "rows that share a rank need not be tied in pairs. A row with failed seeds "
        "is never ranked above another. A row with numbers and no rank looks ahead in a causal slot, as published; its "
        "strict twin is ranked.",
        f"test {wording.named(board.metric)}": "mean over the seeds that succeeded, at the chosen learning rate, with "
        f"the Student-t interval at {level}. Equal values give an interval without width: no spread was seen, which is "
        "not to say that there is none.",
        "every seed": "in the order of the seeds; a failed one by its status.",
        "solved": solved,
        "valid": "mean over seeds on the validation split.",
        "learning rate": "the only one that was run."
        if board.grid[1] == 1
        else "chosen by `valid` alone; a rate with failed seeds ranks below one without. "
        f"▲ / ▼: the largest / smallest of the grid{below}.",
        "parameters": "trainable, embeddings included.",
        "state": "measured bytes that decoding one sequence carries after the given tokens, all layers; 1 kB is 1000 "
        "bytes.",
        "steps": "median until training ended, which is early when the task is solved on valid.",
        "tokens/s": "training tokens per second, evaluation excluded, median over seeds.",
        "decode ms/token": "at batch 1, median over seeds.",
        "peak memory": "maximum over seeds; on a CPU that of the whole process.",
    }
    if board.solvers:
        trivial = (
            "what a solver that learns no more than its name says reaches on test, fitted on train"
            f"{' (xz on nothing: it packs test)' if 'xz' in board.solvers else ''}; mean over seeds."
        )
        texts["floor: trivial solver"] = trivial
    if board.references:
        texts["reference: given more, or a part of the answer"] = (
            "what a solver reaches that is given more than the network, such as a longer past, or that computes a part "
            "of the answer and guesses the rest."
        )
    return {name: text for name, text in texts.items() if text}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """A Markdown table, aligned as text too; columns in `left` to the left, the others to the right."""
    cells = [[escape(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def escape(text: str) -> str:
    """Text that Markdown shows as it is: one line, no markup, no HTML, no link, no new table cell."""
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    text = re.sub(r"([\\`*|~])", r"\\\1", text)
    text = re.sub(r"\]\(|\]\[", lambda found: "\\" + found[0], text)  # a bracket alone is no link
    text = text.replace("://", ":&#47;&#47;")  # a bare address would become one
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def terminal(board: Board) -> Table:
    """The ranked table for the end of a run, in about 100 columns; the whole one is the page."""
    from rich.table import Table
    from rich.text import Text

    one_device = board.costs["device"].nunique() < 2  # times of several devices are not for one column
    measured = {line[0]: [line[2], line[4], line[5]] for line in costs(board)[1]} if one_device else {}
    header, rows = ranking(board)
    wanted = [i for i, name in enumerate(header) if name not in ("every seed", "valid", "note")]
    lines = [
        ["rate" if header[i] == "learning rate" else header[i] for i in wanted] + ["state", "tokens/s", "ms/token"]
    ]
    for row in rows:
        cells = [row[i].split()[0] if header[i] == SOLVED else row[i] for i in wanted]
        lines.append([*cells, *measured.get(row[1], [wording.NOTHING] * 3)])
    shown = Table(title=Text(wording.title(board)), title_justify="left", box=None, pad_edge=False)
    for name, *cells in zip(*lines, strict=True):
        if name == "attention":  # the only one that may be cut in a narrow terminal
            shown.add_column(Text(name), no_wrap=True)
        else:
            shown.add_column(Text(name), no_wrap=True, justify="right", min_width=max(map(len, [name, *cells])))
    for line in lines[1:]:
        shown.add_row(*map(Text, line))
    if len(board.runs):
        failed = board.table[board.table["test_mean"].isna()].to_dict("records")
        reasons = [f"{row['attention']}: {row['status']}, {row['reason']}" for row in failed]
        shown.caption = Text("\n".join([wording.conditions(board)["Runs"], *wording.warnings(board), *reasons]))
        shown.caption_justify = "left"
    return shown
