"""Time series from CSV files: reading, a regular clock, splits in time order, calendar marks and windows."""

from __future__ import annotations

import difflib
import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks import sources
from tasks.base import SPLITS

Array = np.ndarray[Any, Any]

# packaged series: column of the date, then variable -> file inside the package, column
PACKAGED: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "elec_vic": ("ds", {"demand": ("statsmodels/tsa/stl/tests/results/mstl_elec_vic.csv", "y")}),
    "temps_2city": (
        "date",
        {
            "seattle": ("vega_datasets/_data/seattle-temps.csv", "temp"),
            "san_francisco": ("vega_datasets/_data/sf-temps.csv", "temp"),
        },
    ),
    "cgm": ("datetime", {"glucose": ("bokeh_sampledata/_data/CGM.csv.gz", "glucose")}),
}
MISSING = {"", "nil", "na", "nan", "null"}  # cells without a reading
# names of a time -> its value scaled to [-0.5, 0.5], as in Informer's code (utils/timefeatures.py)
MARKS = {
    "minute": lambda t: (t - t.astype("M8[h]")).astype("m8[m]").astype(int) / 59,
    "hour": lambda t: (t - t.astype("M8[D]")).astype("m8[h]").astype(int) / 23,
    "weekday": lambda t: (t.astype("M8[D]").astype(int) + 3) % 7 / 6,  # 1970-01-01 was a Thursday; Monday is 0
    "day": lambda t: (t.astype("M8[D]") - t.astype("M8[M]")).astype(int) / 30,
    "yearday": lambda t: (t.astype("M8[D]") - t.astype("M8[Y]")).astype(int) / 365,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Variables over time, oldest first.

    Args:
        times: [T] datetime64[s].
        values: [T, V] float64; NaN where a regular clock has no reading.
        names: of the V variables.
    """

    times: Array
    values: Array
    names: tuple[str, ...]


# -- reading --------------------------------------------------------------------------------------


def read(data: str, path: str | None, date: str) -> Series:
    """A series by name.

    Args:
        data: elec_vic, temps_2city or cgm; a source of the hub; or any name for the CSV file at `path`.
        path: a copy of yours: a CSV file, or a folder with a file of that name.
        date: the column of the time, of a CSV file.

    Raises:
        MissingData: it is not on this machine.
        ValueError: the file is not what it should be.
    """
    if data in PACKAGED:
        date, columns = PACKAGED[data]
        alone = len({file for file, _ in columns.values()}) == 1
        parts = [
            parse(sources.member(data, file, path, alone=alone), date, f"{data}, {name}").only(column, name)
            for name, (file, column) in columns.items()
        ]
        return _joined(parts)
    if path is None and data in sources.SOURCES:
        stored = sources.table(data, "train").to_dict()
        return _made(stored.pop(date), stored, data)
    if path is None:
        raise sources.MissingData(
            f"{data} is read from a CSV file of yours, with a column {date} and one for each variable; "
            "type task.path=FILE.csv"
        )
    file = Path(path).expanduser()
    if file.is_dir():
        found = sorted(entry for entry in file.glob("*.csv") if entry.stem.lower() == data.lower())
        if not found:
            raise sources.MissingData(f"{path} has no {data}.csv; type task.path=FILE.csv")
        file = found[0]
    if not file.is_file():
        raise sources.MissingData(f"no such file or folder: {path}; type task.path=FILE.csv")
    return parse(file.read_bytes(), date, file.name)


@dataclass(frozen=True, kw_only=True)
class _Read(Series):
    def only(self, column: str, name: str) -> Series:
        """One variable under a name of ours."""
        index = self.names.index(_known(column, self.names, f"column of {name}"))
        return Series(times=self.times, values=self.values[:, index : index + 1], names=(name,))


def parse(content: bytes, date: str, file: str) -> _Read:
    """The content of a CSV file, gzip or not: a header, then rows of one time and numbers.

    Raises:
        ValueError: no such column, a cell that is no number, or a time that is not like 2016-07-01 00:00:00.
    """
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    lines = content.decode("utf-8-sig").splitlines()
    header = [name.strip().strip('"') for name in lines[0].split(",")] if lines else []
    _known(date, header, f"column of the date in {file}")
    others = [i for i, name in enumerate(header) if name != date]
    body = "\n".join(lines[1:])
    try:
        stamps = np.loadtxt(io.StringIO(body), dtype=str, delimiter=",", usecols=header.index(date), ndmin=1)
        cells: dict[str, Any] = dict(delimiter=",", usecols=others, ndmin=2)
        try:
            values = np.loadtxt(io.StringIO(body), **cells)
        except ValueError:  # slower
            values = np.loadtxt(io.StringIO(body), converters=_number, **cells)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return _made(stamps, {header[i]: values[:, n] for n, i in enumerate(others)}, file)


def _number(cell: str) -> float:
    return np.nan if cell.strip().lower() in MISSING else float(cell)


def _made(stamps: Any, columns: dict[str, Any], file: str) -> _Read:
    text = np.asarray(stamps)
    try:
        if text.dtype.kind == "U":
            text = np.char.replace(np.char.rstrip(np.char.replace(text, "/", "-"), "Z"), " ", "T")
        times = text.astype("M8[s]")
    except ValueError as error:
        raise ValueError(f"{file}: {error}; times must be like 2016-07-01 00:00:00") from None
    values = np.stack([np.asarray(column, np.float64) for column in columns.values()], 1)
    return _Read(times=times, values=values, names=tuple(columns))


def _joined(parts: Sequence[Series]) -> Series:
    """Variables of several files at the times that all of them have."""
    times = parts[0].times
    for part in parts[1:]:
        times = np.intersect1d(times, part.times)
    columns = [part.values[np.isin(part.times, times)] for part in parts]
    return Series(times=times, values=np.concatenate(columns, 1), names=tuple(part.names[0] for part in parts))


def _known(name: str, names: Sequence[str], what: str) -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise ValueError(f'unknown {what} "{name}"; nearest: {near[0] if near else "none"}')
    return name


def chosen(series: Series, names: Sequence[str]) -> list[int]:
    """Columns of the variables of these names."""
    return [series.names.index(_known(name, series.names, "task.target")) for name in names]


# -- clock, splits, marks, windows ----------------------------------------------------------------


def on_clock(series: Series, minutes: int | None) -> Series:
    """The series on a regular clock: each reading at the nearest tick, the first of several at one; NaN at the others.

    Args:
        minutes: between two ticks, counted from the first reading; None: rows follow each other as they are.
    """
    if minutes is None:
        return series
    tick = np.rint((series.times - series.times[0]).astype(np.int64) / (60 * minutes)).astype(np.int64)
    tick, first = np.unique(tick, return_index=True)
    values = np.full((tick[-1] + 1, len(series.names)), np.nan)
    values[tick] = series.values[first]
    times = series.times[0] + np.arange(len(values)) * np.timedelta64(60 * minutes, "s")
    return Series(times=times, values=values, names=series.names)


def borders(rows: int, split: Sequence[float]) -> dict[str, tuple[int, int]]:
    """First and last row (exclusive) of train, valid and test, in time order.

    Args:
        split: three numbers of rows; or three shares, where train and test are rounded down and valid has the rest.

    Raises:
        ValueError: not three of a kind, or more rows than there are.
    """
    if len(split) != 3 or min(split) <= 0:
        raise ValueError(
            f"split must be three numbers of rows or three shares, got {list(split)}; nearest: 0.6,0.2,0.2"
        )
    if all(isinstance(part, int) for part in split):
        lengths = [int(part) for part in split]
        if sum(lengths) > rows:
            raise ValueError(f"split asks for {sum(lengths)} rows and there are {rows}; type task.split=[0.6,0.2,0.2]")
    else:
        if abs(sum(split) - 1) > 1e-9:
            raise ValueError(f"split must be rows or shares that sum to 1, got {list(split)}; nearest: 0.6,0.2,0.2")
        train, test = int(rows * split[0]), int(rows * split[2])
        lengths = [train, rows - train - test, test]
    ends = np.cumsum([0, *lengths]).tolist()
    return dict(zip(SPLITS, pairwise(ends), strict=True))


def starts(values: Array, border: tuple[int, int], context: int, horizon: int, stride: int) -> Array:
    """First rows of all windows of `context` + `horizon` complete rows whose horizon lies inside a split.

    The context of the first windows reaches back over the border, as published.
    """
    first = max(0, border[0] - context)
    size = context + horizon
    candidates = np.arange(first, border[1] - size + 1, stride)
    missing = np.concatenate([[0], np.cumsum(np.isnan(values).any(1))])
    return candidates[missing[candidates + size] == missing[candidates]]


def marks(times: Array, names: Sequence[str]) -> Array:
    """Calendar marks [T, len(names)] in [-0.5, 0.5].

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        _known(name, list(MARKS), "mark")
    columns = [MARKS[name](times) - 0.5 for name in names]
    return np.stack(columns, 1) if columns else np.zeros((len(times), 0))


def windows(table: Tensor, first: Array, length: int) -> Tensor:
    """Rows first[i] .. first[i] + length - 1 of a table [T, F] as [N, length, F]: a view where `first` is a range."""
    view = table.unfold(0, length, 1).transpose(1, 2)
    steps = np.unique(np.diff(first))
    if len(first) and len(steps) <= 1:
        return view[int(first[0]) : int(first[-1]) + 1 : int(steps[0]) if len(steps) else 1]
    return view[torch.from_numpy(first)]
