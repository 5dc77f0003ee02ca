"""Progress of a sweep: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from bench.plan import Cell

PLAIN_SECONDS = 10.0  # at most one line of progress in this time when the output is not a terminal


@dataclass
class Row:
    """What is known of one cell."""

    title: str
    planned: int
    max_steps: int
    recorded: int = 0
    done: int = 0
    steps: dict[str, int] = field(default_factory=dict)  # of the replicas in progress
    best: float | None = None
    higher_is_better: bool = True
    statuses: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the cell's work that is done, 0 to 1; a replica that stopped early is done."""
        return min(1.0, (self.recorded + self.done + sum(self.steps.values()) / self.max_steps) / self.planned)


class Progress:
    """Told of events by the sweep; use as a context manager."""

    def __init__(self, cells: list[Cell], out: TextIO | None = None):
        self.out = out or sys.stdout
        self.rows = {cell.id: Row(cell.names["attention"], cell.planned, cell.budget.max_steps) for cell in cells}
        tasks = {(cell.names["task"], cell.names["backbone"]) for cell in cells}
        if len(tasks) > 1:
            for cell in cells:
                self.rows[cell.id].title = cell.title
        self.started = self.last_line = time.monotonic()
        self.wait = 0
        self.live: Any = None

    def __enter__(self) -> Progress:
        if self.out.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(get_renderable=self._table, console=Console(file=self.out), refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def admitted(self, cell: Cell, recorded: int) -> None:
        """A cell was taken up, `recorded` of its replicas being done already."""
        row = self.rows[cell.id]
        row.recorded = recorded
        if recorded == row.planned:
            self._line(f"{row.title}: all {recorded} runs recorded already")

    def settled(self, cell: Cell, needed: int) -> None:
        """A search by the first seed has found how many runs a cell needs: fewer than planned where no rate works."""
        row = self.rows[cell.id]
        if needed < row.planned:
            row.planned = needed
            self._ended(row)

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        """An event of a child: start, step or done."""
        row = self.rows[cell.id]
        row.higher_is_better = event.get("higher_is_better", row.higher_is_better)
        if (metric := event.get("metric")) is not None:
            row.best = (max if row.higher_is_better else min)(metric if row.best is None else row.best, metric)
        if event["event"] == "step":
            row.steps[event["run_id"]] = event["step"]
        elif event["event"] == "done":
            row.steps.pop(event["run_id"], None)
            row.done += 1
            row.statuses.append(event["status"])
            if event["status"] not in ("ok", "unsupported"):
                self._line(f"{row.title}: {event['status']}: {event['reason']}")
            self._ended(row)
        if self.live is None and time.monotonic() - self.last_line > PLAIN_SECONDS:
            self._line(self._headline())

    def waiting(self, cells: int) -> None:
        """Cells that another sweep on the same folder is working on."""
        if cells != self.wait and cells:
            self._line(f"waiting for another sweep to finish {cells} cell{'s' if cells > 1 else ''}")
        self.wait = cells

    def _ended(self, row: Row) -> None:
        if row.recorded + row.done == row.planned:
            self._line(f"{row.title}: done, {row.planned} runs, best valid {_number(row.best)}")

    def _line(self, text: str) -> None:
        self.last_line = time.monotonic()
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.out, flush=True)

    def _headline(self) -> str:
        planned = sum(row.planned for row in self.rows.values())
        finished = sum(row.share * row.planned for row in self.rows.values())
        gained = finished - sum(row.recorded for row in self.rows.values())  # by this sweep, in runs
        elapsed = time.monotonic() - self.started
        known = gained > 0.01 * planned and finished < planned
        left = f", about {_duration(elapsed * (planned - finished) / gained)} left" if known else ""
        done = sum(row.recorded + row.done for row in self.rows.values())
        return f"{done} of {planned} runs, {_duration(elapsed)}{left}"

    def _table(self) -> Any:
        from rich.markup import escape
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(title=self._headline(), title_justify="left", box=None, pad_edge=False)
        table.add_column("attention")
        table.add_column("progress", width=30)
        table.add_column("runs", justify="right")
        table.add_column("best valid", justify="right")
        table.add_column("")
        for row in self.rows.values():
            bad = sorted({status for status in row.statuses if status != "ok"})
            table.add_row(
                escape(row.title),
                ProgressBar(total=1.0, completed=row.share, width=30),
                f"{row.recorded + row.done}/{row.planned}",
                _number(row.best),
                " ".join(bad),
            )
        return table


def _number(best: float | None) -> str:
    return "-" if best is None else f"{best:.3f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
