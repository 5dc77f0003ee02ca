"""The report: leaderboards, tables and plots as pure functions of the tidy frames. Same frames, same bytes.

Importing this package is light; pandas and matplotlib come in when something is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from bench.report.frames import Frames
    from bench.report.group import Group
    from bench.report.leaderboard import Board, Key

SOLVED = 0.99  # a seed has solved a task of unit 'fraction' from here on; also the ceiling of the edge warning
NOTHING = "nothing to report: no runs are recorded; type make bench TASK=mqar"


def write(
    frames: Frames,
    folder: Path,
    *,
    defaults: Mapping[str, str],
    only: Iterable[tuple[str, str, str]] | None = None,
    solved: float = SOLVED,
) -> list[Path]:
    """Write every board that the frames hold, and a page for every group of boards; twice changes no byte and no file.

    Args:
        frames: see bench.report.frames.
        folder: results/leaderboards; each board gets a folder in it.
        defaults: names of the default `backbone` and `budget`, which a folder's name leaves out.
        only: restrict to these (task, backbone, budget), and to the groups that they belong to.
        solved: threshold of the solve rate.

    Returns:
        The files of the boards, then of the groups and of MAD's scores, in order; none when there is nothing to report.

    Raises:
        UserError: the folder cannot be written.
    """
    from bench.report import files, group, leaderboard, mad_page

    boards = leaderboard.boards(frames, solved=solved)
    names = leaderboard.folder_names([board.key for board in boards], defaults)
    wanted = {board.key for board in boards} if only is None else {leaderboard.Key(*key) for key in only}
    paths = [
        path
        for board in boards
        if board.key in wanted
        for path in files.save(folder / names[board.key], contents(board))
    ]
    pages = group.groups(boards)
    folders = group.folder_names([page.key for page in pages], defaults, taken=names.values())
    links = {key: f"../{name}/leaderboard.md" for key, name in names.items()}
    for page in pages:
        if any(column.board.key in wanted for column in page.columns):
            paths += files.save(folder / folders[page.key], group_contents(page, links), files.OWN_OF_GROUP)
    for name, made in mad_page.pages(boards, defaults).items():
        paths += files.save(folder / name, made, mad_page.OWN)
    return paths


def write_overview(folder: Path) -> list[Path]:
    """README.md of a folder of boards: a line for each, also for those of earlier reports.

    Raises:
        UserError: the folder cannot be written.
    """
    from bench.report import files, overview

    return files.save(folder, {overview.NAME: overview.page(folder)}, [overview.NAME])


def contents(board: Board) -> dict[str, bytes]:
    """File name -> bytes of one board: the page first, then plots and tables."""
    from bench.report import files, markdown, plots, wording
    from bench.report.figure import render

    pictures = {name: render(draw, board) for name, (draw, _) in plots.PLOTS.items()}
    drawn = {name: picture for name, picture in pictures.items() if picture is not None}
    shown = {name: plots.PLOTS[name][1].format(metric=wording.heading(board.metric)) for name in drawn}
    return {
        "leaderboard.md": markdown.page(board, shown).encode(),
        "leaderboard.csv": files.csv(board.table, board),
        **drawn,
        **files.tables(board.frames),
    }


def group_contents(group: Group, links: Mapping[Key, str]) -> dict[str, bytes]:
    """File name -> bytes of one group; `links`: key of a board -> address of its page."""
    from bench.report import files, group_page, group_plot
    from bench.report.figure import render

    pictures = {name: render(draw, group) for name, (draw, _) in group_plot.PLOTS.items()}
    drawn = {name: picture for name, picture in pictures.items() if picture is not None}
    shown = {name: group_plot.PLOTS[name][1] for name in drawn}
    return {
        "index.md": group_page.page(group, links, shown).encode(),
        "index.csv": files.csv(group_page.csv_table(group)),
        **drawn,
    }


def tables(
    frames: Frames, *, only: Iterable[tuple[str, str, str]] | None = None, solved: float = SOLVED
) -> list[Table]:
    """The tables for the terminal: one per board, then one per group; `only` as in `write`."""
    from bench.report import group, group_page, leaderboard, markdown

    boards = leaderboard.boards(frames, solved=solved)
    wanted = {board.key for board in boards} if only is None else {leaderboard.Key(*key) for key in only}
    pages = [g for g in group.groups(boards) if any(column.board.key in wanted for column in g.columns)]
    return [
        *(markdown.terminal(board) for board in boards if board.key in wanted),
        *(group_page.terminal(page) for page in pages),
    ]
