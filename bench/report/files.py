"""Tables as CSV and Parquet, and files that are whole or absent."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from bench import atomic
from bench.errors import UserError
from bench.report.frames import SCHEMAS, Frames
from bench.report.group_plot import PLOTS as GROUP_PLOTS
from bench.report.leaderboard import Board, slice_order
from bench.report.plots import PLOTS

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that begins with one of these
OWN = [
    "leaderboard.md",
    "leaderboard.csv",
    *PLOTS,
    *(f"{name}.{kind}" for name in SCHEMAS for kind in ("csv", "parquet")),
]
OWN_OF_GROUP = ["index.md", "index.csv", *GROUP_PLOTS]


def csv(table: pd.DataFrame, board: Board | None = None) -> bytes:
    """A frame as CSV, text cells guarded against formulas; a board's gets a column for each segment.

    Numbers are written in full, so reading them gives the same floats; a guarded cell begins with an apostrophe.
    """
    table = table.copy()
    if board is not None:
        part = board.slices[board.slices["slice_key"] == "segment"].set_index(["attention", "slice_value"])["mean"]
        for name in sorted(part.index.unique("slice_value"), key=slice_order):
            table[f"segment_{name}"] = table["attention"].map(part.xs(name, level="slice_value"))
    for column in table.columns:
        if not pd.api.types.is_numeric_dtype(table[column]):
            table[column] = table[column].map(_guard, na_action="ignore")
    return table.to_csv(index=False, lineterminator="\n").encode()


def _guard(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def tables(frames: Frames) -> dict[str, bytes]:
    """`runs`, `scores` and `history` as CSV and as Parquet, the exact one."""
    out = {}
    for name in SCHEMAS:
        frame = getattr(frames, name)
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        out[f"{name}.csv"], out[f"{name}.parquet"] = csv(frame), buffer.getvalue()
    return out


def save(folder: Path, files: Mapping[str, bytes], own: Collection[str] = OWN) -> list[Path]:
    """Write files into a folder, each temp -> rename; what did not change is not touched, what is gone is removed.

    Args:
        own: names that this page may write; those that are not among `files` are removed.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            if not (path.is_file() and path.read_bytes() == content):
                atomic.replace(path, content)
        for name in set(own) - set(files):  # a plot that no longer has data must not stay beside the new page
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the report to {folder}: {error.strerror or error}; type --results FOLDER with another folder"
        ) from error
    return [folder / name for name in files]
