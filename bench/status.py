"""`python -m bench.status [overrides]`: planned, done, failed and stale runs of a sweep, from configs and records."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from bench import errors, plan
from bench.store import Store

DONE = ("ok", "unsupported", "nan", "diverged")


def main() -> int:
    """Takes the overrides of the sweep itself: `python -m bench.status suite=recall`."""
    from bench.expand import expand

    parser = argparse.ArgumentParser(prog="python -m bench.status", description=__doc__.partition("`: ")[2])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="those of the sweep, such as suite=recall")
    parser.add_argument("-m", "--multirun", action="store_true", help="makes no difference: sweeps are always expanded")
    parser.add_argument("--config-dir", help="folder with YAMLs of your own")
    arguments = parser.parse_intermixed_args()
    cells = plan.merge(plan.cell(choice) for choice in expand(arguments.overrides, arguments.config_dir))
    again = (*plan.ALWAYS_RETRIED, *(cells[0].settings["retry"] or ()))
    store = Store(Path(cells[0].settings["results"]).absolute())
    records, warnings = store.read_all()
    latest = {record["run_id"]: record for record in records}
    configs = {record["config_id"]: record for record in records}
    total: Counter[str] = Counter()
    for cell in cells:
        counts: Counter[str] = Counter()
        needed, left = plan.outstanding(cell, store)
        if any(replica in cell.scouts for replica in left):  # which of the others will be needed is not known yet
            counts["planned"] = cell.planned - len(needed)
        for replica in needed:
            record = latest.get(replica.run_id)
            if record is not None:
                counts[record["status"]] += 1
            elif replica.config_id in configs:
                counts["stale"] += 1
            else:
                counts["planned"] += 1
        total += counts
        print(f"{cell.title:60} {_line(counts)}")
    for warning in warnings:
        print(warning, file=sys.stderr)
    done = sum(total[status] for status in DONE)
    todo = sum(total[status] for status in ("planned", "stale", *again))
    failed = sum(total.values()) - done - total["planned"] - total["stale"]
    print(f"planned {sum(total.values())}: done {done}, failed {failed}, stale {total['stale']}; to do {todo}")
    return 0


def _line(counts: Counter[str]) -> str:
    return ", ".join(f"{status} {count}" for status, count in sorted(counts.items()))


if __name__ == "__main__":
    errors.run(main)
