"""Series in the .ts format of the UEA and UCR archives."""

from __future__ import annotations

import numpy as np

from tasks.sources import MissingData


def read(text: str, name: str) -> tuple[list[np.ndarray], list[str]]:
    """Series [T, F] float64, each of its own length, and their labels.

    A header of lines with @, then @data, then a case a line: channels between colons, values between commas, the label
    last.

    Args:
        name: of the file, for the message.

    Raises:
        MissingData: it is in another format, has missing values or labels, or channels of unequal length or number.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    starts = [place for place, (_, line) in enumerate(lines) if line.lower() == "@data"]
    if not starts:
        raise MissingData(f"{name} has no line @data; it must be in the .ts format of the UEA archive")
    header = [line.lower().split() for _, line in lines[: starts[0]] if line.startswith("@")]
    if not any(words[:2] == ["@classlabel", "true"] for words in header):
        raise MissingData(f"{name} has no line @classLabel true; it must have classes")
    if any(words[:2] == ["@timestamps", "true"] for words in header):
        raise MissingData(f"{name} has time stamps, which are not read; it must have values alone")
    series: list[np.ndarray] = []
    labels: list[str] = []
    for number, line in lines[starts[0] + 1 :]:
        if not line or line.startswith("#"):
            continue
        *channels, label = line.split(":")
        try:
            values = np.array([[float(value) for value in channel.split(",")] for channel in channels]).T
        except ValueError:
            values = np.empty(0)
        if values.ndim != 2 or not np.isfinite(values).all() or not label:
            raise MissingData(
                f"{name}, line {number}: must be numbers between commas, channels of one length between colons, a label"
            )
        if series and values.shape[1] != series[0].shape[1]:
            raise MissingData(f"{name}, line {number}: {values.shape[1]} channels after {series[0].shape[1]}")
        series.append(values)
        labels.append(label)
    return series, labels
