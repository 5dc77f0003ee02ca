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
    from bench.report.leaderboard import Board

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
    """Write every board that the frames hold; a second call changes no byte and no file.

    Args:
        frames: see bench.report.frames.
        folder: results/leaderboards; each board gets a folder in it.
        defaults: names of the default `backbone` and `budget`, which a folder's name leaves out.
        only: restrict to these (task, backbone, budget).
        solved: threshold of the solve rate.

    Returns:
        The files of the boards, in order; none when there is nothing to report.

    Raises:
        UserError: the folder cannot be written.
    """
    from bench.report import files, leaderboard

    boards = leaderboard.boards(frames, solved=solved)
    names = leaderboard.folder_names([board.key for board in boards], defaults)
    wanted = None if only is None else {tuple(key) for key in only}
    return [
        path
        for board in boards
        if wanted is None or tuple(board.key) in wanted
        for path in files.save(folder / names[board.key], contents(board))
    ]


def contents(board: Board) -> dict[str, bytes]:
    """File name -> bytes of one board: the page first, then plots and tables."""
    from bench.report import files, markdown, plots
    from bench.report.figure import render

    pictures = {name: render(draw, board) for name, (draw, _) in plots.PLOTS.items()}
    drawn = {name: picture for name, picture in pictures.items() if picture is not None}
    shown = {name: f"{board.metric.capitalize()}: {plots.PLOTS[name][1]}" for name in drawn}
    return {
        "leaderboard.md": markdown.page(board, shown).encode(),
        "leaderboard.csv": files.csv(board.table, board),
        **drawn,
        **files.tables(board.frames),
    }


def tables(
    frames: Frames, *, only: Iterable[tuple[str, str, str]] | None = None, solved: float = SOLVED
) -> list[Table]:
    """The ranked tables for the terminal, one per board; `only` as in `write`."""
    from bench.report import leaderboard, markdown

    return [markdown.terminal(board) for board in leaderboard.boards(frames, solved=solved, only=only)]
