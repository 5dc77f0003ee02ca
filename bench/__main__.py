"""`python -m bench`: the Hydra application. Composes every job of a sweep, then runs all of their cells together."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import errors
from bench.config import CONF, Choice, check_overrides, choice, explain
from bench.errors import UserError
from bench.expand import seeds_as_one
from bench.plan import Cell
from bench.store import Store
from bench.suites import completed

jobs: list[Choice] = []
mistakes: list[UserError] = []  # raised inside Hydra they would come with a preface of Hydra's own
exit_status = 0
MANY = 25  # jobs that take seconds to compose


def main() -> int:
    """Parse with Hydra, collect its jobs, run them as one sweep."""
    import hydra
    from hydra._internal.utils import get_args_parser

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, and `explain` puts them in one line
    arguments = get_args_parser().parse_args()
    for flag in ("config_path", "config_name", "experimental_rerun"):
        if getattr(arguments, flag) is not None:
            raise UserError(
                f"--{flag.replace('_', '-')} is refused; put YAMLs of yours into a folder and type --config-dir FOLDER"
            )
    own = [seeds_as_one(text) for text in arguments.overrides]
    overrides = completed(own, arguments.config_dir)
    check_overrides(overrides, arguments.config_dir)
    flags = [text for text in sys.argv[1:] if seeds_as_one(text) not in own]
    with tempfile.TemporaryDirectory() as scratch:  # Hydra leaves a multirun.yaml; ours is the config in each record
        if not any("hydra/launcher=" in text for text in overrides):
            overrides[:0] = [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
        sys.argv, typed = [sys.argv[0], *flags, *overrides], sys.argv
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(collect)()
        except (UserError, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            raise explain(error, overrides, arguments.config_dir) from error
        finally:
            sys.argv = typed
    for mistake in mistakes:
        raise mistake
    return run(jobs) if jobs else exit_status


def collect(config: Any) -> None:
    """Hydra's task function: keep the job for later, or run it here when a launcher has carried it to a worker."""
    global exit_status
    if len(jobs) == MANY:
        print(f"{MANY} configurations composed, more to come", file=sys.stderr)  # a big sweep is not a hanging one
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    try:
        job = choice(config, settings.runtime.choices, settings.overrides.task)
    except UserError as mistake:
        mistakes.append(mistake)
        return
    if "basic_launcher" in settings.launcher._target_:
        jobs.append(job)
    else:
        exit_status = max(exit_status, run([job]))


def run(choices: list[Choice]) -> int:
    """Run all cells of the composed jobs and report; the exit status is 1 when a run failed for an outer reason."""
    from bench import environment, plan
    from bench.progress import Progress
    from bench.sweep import FAILED, Sweep, slots

    settings = choices[0].settings
    for key, value in settings.items():
        if any(job.settings[key] != value for job in choices):
            raise UserError(f"{key} is a setting of the whole sweep and cannot be swept over; type {key}={value}")
    cells = plan.merge(plan.cell(job) for job in choices)
    store = Store(Path(settings["results"]).absolute())
    command = "python -m bench " + " ".join(sys.argv[1:])
    with Progress(cells) as progress:
        sweep = Sweep(
            cells=cells,
            store=store,
            retry=settings["retry"] or (),
            slots=slots(settings["device"], settings["jobs"]),
            progress=progress,
            facts=dict(command=command, **environment.code()),
        )
        try:
            sweep.run()
        finally:
            for warning in sweep.warnings:
                print(warning, file=sys.stderr)
    write_report(store, cells)
    for reason in sweep.impossible.values():
        raise UserError(reason)
    return 1 if any(sweep.statuses[status] for status in FAILED) else 0


def write_report(store: Store, cells: list[Cell]) -> None:
    """Rebuild the leaderboards that the cells belong to, print their ranked tables and name the files."""
    from rich.console import Console

    from bench import report
    from bench.config import defaults
    from bench.tables import read_frames

    frames, warnings = read_frames(store, {replica.run_id: cell.names for cell in cells for replica in cell.replicas})
    boards = {(cell.names["task"], cell.names["backbone"], cell.names["budget"]) for cell in cells}
    paths = report.write(frames, store.root / "leaderboards", defaults=defaults(), only=boards)
    paths += report.write_overview(store.root / "leaderboards") if paths else []
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in report.tables(frames, only=boards):
        console.print(table)
    for warning in warnings:
        print(warning, file=sys.stderr)
    for path in paths:
        print(os.path.relpath(path))


if __name__ == "__main__":
    errors.run(main)
