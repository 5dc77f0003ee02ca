"""`python -m bench.status [overrides]`: planned, done, failed and stale runs of a sweep, from configs and records."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from bench import errors, plan
from bench.store import Store

DONE = ("ok", "unsupported", "nan", "diverged")


def main() -> int:
    """Takes the overrides of the sweep itself: `python -m bench.status suite=recall`."""
    from bench.expand import expand

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        print("Give it the same overrides as the sweep, e.g. suite=recall or attention=softmax,based seed=0,1,2")
        return 0
    cells = plan.merge(plan.cell(choice) for choice in expand(sys.argv[1:]))
    store = Store(Path(cells[0].settings["results"]).absolute())
    records, warnings = store.read_all()
    latest = {record["run_id"]: record for record in records}
    configs = {record["config_id"]: record for record in records}
    total: Counter[str] = Counter()
    for cell in cells:
        counts: Counter[str] = Counter()
        for replica in cell.replicas:
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
    failed = sum(total.values()) - done - total["planned"] - total["stale"]
    print(
        f"planned {sum(total.values())}: done {done}, failed {failed}, stale {total['stale']}, to do {total['planned']}"
    )
    return 0


def _line(counts: Counter[str]) -> str:
    return ", ".join(f"{status} {count}" for status, count in sorted(counts.items()))


if __name__ == "__main__":
    errors.run(main)
