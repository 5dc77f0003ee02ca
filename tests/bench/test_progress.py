"""Progress: plain lines where there is no terminal, a live table where there is one, and an honest time left."""

import io
import os
import pty
import threading

import pytest
import sweeping

from bench import progress as module
from bench.progress import Progress, _duration


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def cells():
    seeds = "seed=[0,1,2,3]"
    return [sweeping.cell("attention=softmax", seeds), sweeping.cell("attention=broken_nan", seeds)]


def step(cell, replica, number, metric):
    return cell, {"event": "step", "run_id": cell.replicas[replica].run_id, "step": number, "metric": metric}


def done(cell, replica, status="ok", reason="", metric=0.5):
    run_id = cell.replicas[replica].run_id
    return cell, {"event": "done", "run_id": run_id, "status": status, "reason": reason, "metric": metric}


def test_plain_lines_tell_of_ends_and_failures_only(clock):
    out, (good, bad) = io.StringIO(), cells()
    with Progress([good, bad], out) as progress:
        progress.admitted(good, 0)
        for replica in range(4):
            progress.event(good, {"event": "start", "run_id": good.replicas[replica].run_id})
            progress.event(*step(good, replica, 2, 0.25))
            progress.event(*done(good, replica, metric=0.5 + replica / 100))
        progress.admitted(bad, 3)
        progress.event(*done(bad, 3, "nan", "loss is nan at step 2", None))
    assert out.getvalue().splitlines() == [
        "softmax: done, 4 runs, best valid 0.530",
        "broken_nan: nan: loss is nan at step 2",
        "broken_nan: done, 4 runs, best valid -",
    ]


def test_the_best_of_a_loss_is_the_smallest(clock):
    out, (cell, _) = io.StringIO(), cells()
    with Progress([cell], out) as progress:
        progress.admitted(cell, 2)
        for replica, metric in ((2, 1.5), (3, 2.5)):
            start = {"event": "start", "run_id": cell.replicas[replica].run_id, "higher_is_better": False}
            progress.event(cell, start)
            progress.event(*done(cell, replica, metric=metric))
    assert out.getvalue().splitlines()[-1] == "softmax: done, 4 runs, best valid 1.500"


def test_what_is_recorded_already_is_one_line(clock):
    out, (good, _) = io.StringIO(), cells()
    Progress([good], out).admitted(good, 4)
    assert out.getvalue() == "softmax: all 4 runs recorded already\n"


def test_rows_of_several_tasks_are_told_apart():
    both = [sweeping.cell("budget.max_steps=4"), sweeping.cell("task.vocab_size=64")]
    titles = [row.title for row in Progress(both, io.StringIO()).rows.values()]
    assert titles == [cell.title for cell in both] and titles[0] != titles[1]


def test_the_time_left_follows_from_what_this_sweep_did_itself(clock):
    out, (good, bad) = io.StringIO(), cells()
    progress = Progress([good, bad], out)
    assert progress._headline() == "0 of 8 runs, 0 s"
    progress.admitted(good, 3)  # of another day: they took no time now
    clock.now += 60
    assert progress._headline() == "3 of 8 runs, 1 min 00 s"
    progress.event(*done(good, 3))  # the fourth in 60 s, so four more take 240 s
    assert progress._headline() == "4 of 8 runs, 1 min 00 s, about 4 min 00 s left"
    clock.now += 30
    progress.event(*step(bad, 0, 2, 0.1))  # half of its 4 steps: 1.5 runs in 90 s, 3.5 to go
    assert progress._headline() == "4 of 8 runs, 1 min 30 s, about 3 min 30 s left"
    for replica in range(4):
        progress.event(*done(bad, replica))
    assert progress._headline() == "8 of 8 runs, 1 min 30 s"


def test_at_most_one_line_of_progress_in_ten_seconds(clock):
    out, (good, _) = io.StringIO(), cells()
    progress = Progress([good], out)
    for number in range(100):
        clock.now += 1
        progress.event(*step(good, 0, number % 4, 0.1))
    assert out.getvalue().count("\n") == 9  # after more than ten seconds: 11, 22, ... 99


def test_waiting_for_another_sweep_is_said_once(clock):
    out, both = io.StringIO(), cells()
    progress = Progress(both, out)
    for count in (0, 2, 2, 1, 1, 0):
        progress.waiting(count)
    assert out.getvalue().splitlines() == [
        "waiting for another sweep to finish 2 cells",
        "waiting for another sweep to finish 1 cell",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3599, "59 min 59 s")]
)
def test_durations_are_rounded_to_seconds(seconds, text):
    assert _duration(seconds) == text


def test_a_terminal_shows_a_live_table_and_takes_any_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    chunks = []

    def read():
        try:
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    good, bad = cells()
    good.names = {**good.names, "attention": "softmax(a=[1,2],b=[/red])"}  # no markup
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, Progress([good, bad], terminal) as progress:
        assert progress.live is not None
        progress.admitted(good, 1)
        progress.event(*step(good, 1, 2, 0.25))
        progress.event(*done(bad, 0, "error", "ValueError: [/bold] is not closed, x[0]", None))
        progress.live.refresh()
    reader.join()
    os.close(ours)
    screen = b"".join(chunks).decode()
    assert "softmax(a=[1,2],b=[/red])" in screen and "1/4" in screen and "0.250" in screen and "attention" in screen
    assert "broken_nan: error: ValueError: [/bold] is not closed, x[0]" in screen
    assert "2 of 8 runs" in screen and "\x1b[" in screen
