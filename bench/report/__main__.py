"""`python -m bench.report [--results FOLDER]`: rebuild every leaderboard, table and plot from the records alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import errors, report


def main() -> int:
    """Prints the files it wrote, one per line; warnings go to stderr."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("]`: ")[1])
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help="default: results")
    folder: Path = parser.parse_args().results
    if not folder.is_dir():
        raise errors.UserError(
            f"there is no folder {folder}; type --results FOLDER, or make bench TASK=mqar to fill it"
        )

    from bench.config import defaults
    from bench.store import Store
    from bench.tables import read_frames

    frames, warnings = read_frames(Store(folder.absolute()))
    for warning in warnings:
        print(warning, file=sys.stderr)
    paths = report.write(frames, folder / "leaderboards", defaults=defaults())
    paths += report.write_overview(folder / "leaderboards") if paths else []
    print("\n".join(map(str, paths)) if paths else report.NOTHING)
    return 0


if __name__ == "__main__":
    errors.run(main)
