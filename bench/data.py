"""`python -m bench.data task=mqar [seed=0] [task.KEY=VALUE ...] [save=FOLDER]`: make a task's data, hash it, save it.

`python -m bench.data fetch NAME ...` brings real data to this machine, `python -m bench.data sources` lists them.

Prints one line per split and segment; hashes are the sha256 of inputs and labels as little-endian int64, float32 where
they are real numbers, in C order. With save=FOLDER each segment becomes FOLDER/SPLIT_INDEX.npz with `inputs` [N, L] and
`labels` [N, L] (-100 where nothing is asked), in the smallest type that holds them, and where there are any `context`
[N, S], `key_mask` and `context_mask`.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import atomic, errors
from bench.config import compose
from bench.errors import UserError

COLUMNS = (
    "split",
    "segment",
    "examples",
    "length",
    "pairs",
    "labels",
    "bytes",
    "seconds",
    "inputs sha256",
    "labels sha256",
)
OPTIONAL = ("context", "key_mask", "context_mask")


def main() -> int:
    """Raises UserError for a wrong key, value, source or folder."""
    if sys.argv[1:2] == ["fetch"]:
        return fetch(sys.argv[2:])
    if sys.argv[1:] == ["sources"]:
        return show_sources()
    if sys.argv[1:2] == ["sources"]:
        raise UserError(f"sources takes no further words, got {sys.argv[2]}; type python -m bench.data sources")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__, end="")
        return 0
    if sys.argv[1:] and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        raise errors.unknown("command", sys.argv[1], ["fetch", "sources"], "A task is given by task=NAME")
    overrides, folder = read_arguments(sys.argv[1:])
    choice = compose(overrides)
    if len(choice.seeds) > 1:
        raise UserError(f"bench.data takes one seed, got {choice.seeds}; type seed={choice.seeds[0]}")
    seed = choice.seeds[0]

    from bench.cell import make_task  # imports torch: after the settings are known to be right

    task = make_task(choice.parts["task"])
    print(f"{task.id}, version {task.version}, seed {seed}")
    line = "{:<5}  {:>7}  {:>8}  {:>6}  {:>5}  {:>6}  {:>11}  {:>7}  {:<64}  {:<64}".format
    print(line(*COLUMNS).rstrip())
    for row in generate(task, seed, folder):
        print(line(*row), flush=True)
    if folder is not None:
        print(f"saved in {folder}")
    return 0


def fetch(names: Sequence[str]) -> int:
    """Bring the data of some sources to this machine; what is there already is checked."""
    from tasks import sources

    if not names:
        raise UserError(f"which data? there are: {', '.join(sources.SOURCES)}; type python -m bench.data sources")
    for name in names:
        try:
            size = sources.source(name).origin.num_bytes / 1e6
            print(f"{name}: {sources.SOURCES[name].title}; {size:,.1f} MB; {sources.SOURCES[name].licence}", flush=True)
            print(f"{name}: in {sources.fetch(name)}")
        except sources.MissingData as error:
            raise UserError(str(error)) from error
    return 0


def show_sources() -> int:
    """List the sources: on this machine or not, size, licence."""
    from tasks import sources

    line = "{:<12}  {:<4}  {:>10}  {:<42}  {:<85}  {}".format
    print(line("source", "here", "MB", "from", "what", "licence"))
    for name, source in sources.SOURCES.items():
        here = "yes" if sources.is_here(name) else "-"
        size = f"{source.origin.num_bytes / 1e6:,.1f}"
        print(line(name, here, size, source.origin.version_title, source.title, source.licence))
    print("to bring one: python -m bench.data fetch NAME")
    return 0


def read_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Overrides of the configuration, and the folder of save=FOLDER, which is not part of it."""
    folders = [text.partition("=")[2] for text in arguments if text.startswith("save=")]
    overrides = [text for text in arguments if not text.startswith("save=")]
    if len(folders) > 1 or "" in folders:
        raise UserError("save takes one folder; type save=FOLDER")
    if not any(text.startswith("task=") for text in overrides):
        raise UserError("which task? type for example: python -m bench.data task=mqar")
    return overrides, Path(folders[0]).expanduser() if folders else None


def generate(task: Any, seed: int, folder: Path | None) -> Iterator[tuple[Any, ...]]:
    """Rows of the table, one per segment; seconds are those of the whole split, on its first line."""
    from tasks.base import IGNORE, SPLITS

    for split in SPLITS:
        start = time.perf_counter()
        try:
            segments = task.segments(split, seed)
        except ValueError as error:  # data are missing, or these settings have none
            raise UserError(str(error)) from error
        seconds = f"{time.perf_counter() - start:.2f}"
        for index, segment in enumerate(segments):
            pairs = segment.slices["pairs"].unique().tolist() if "pairs" in segment.slices else []
            hashes = segment.sha256()
            if folder is not None:
                save(folder / f"{split}_{index}.npz", segment)
            yield (
                split,
                index,
                *segment.inputs.shape[:2],
                "-".join(map(str, sorted({*pairs[:1], *pairs[-1:]}))) or "-",
                int((segment.targets != IGNORE).sum(1).max()),
                sum(t.numel() * t.element_size() for t in (segment.inputs, segment.positions, segment.targets)),
                "" if index else seconds,
                hashes["inputs"],
                hashes["labels"],
            )


def save(path: Path, segment: Any) -> None:
    """Write one segment, whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    import numpy as np

    labels = segment.labels().numpy()
    if labels.dtype.kind == "i":
        labels = labels.astype(np.result_type(np.min_scalar_type(labels.min()), np.min_scalar_type(labels.max())))
    tensors = {"inputs": segment.inputs, **{name: getattr(segment, name) for name in OPTIONAL}}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
    buffer = io.BytesIO()
    np.savez(buffer, labels=labels, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(path, buffer.getvalue())
    except OSError as error:
        raise UserError(
            f"cannot save in {path.parent}: {error.strerror or error}; type save=FOLDER with another folder"
        ) from error


if __name__ == "__main__":
    errors.run(main)
