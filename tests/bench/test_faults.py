"""Faults from outside: killed, hung, interrupted, full, twice at a time. What is recorded stays, the rest resumes.

Children import torch, seconds each, so several faults share a sweep, and the tables of all resumed sweeps are compared
with one that nothing disturbed.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import sweeping
from filelock import FileLock

from bench import plan
from bench.errors import UserError
from bench.isolation import Child
from bench.progress import Progress
from bench.store import SCHEMA, Store, canonical, checksum
from bench.sweep import Sweep, slots

pytestmark = pytest.mark.fault
GRID = ["seed=[0,1]", "budget.learning_rates=[0.01,0.03]"]


def in_process(results, cells, retry=(), jobs=2):
    """A sweep whose parent is this process."""
    with Path(os.devnull).open("w") as silence:
        sweep = Sweep(
            cells=cells,
            store=Store(results),
            retry=retry,
            slots=slots("cpu", jobs),
            progress=Progress(list(cells), silence),
            facts={"command": "test"},
        )
        sweep.run()
    return sweep


@pytest.fixture(autouse=True)
def plugin_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", sweeping.environment()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of four runs that nothing happened to, by `python -m bench`."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    run = sweeping.sweep(results, "attention=broken_gate", *GRID)
    assert (run.returncode, run.stderr) == (0, "") and "done, 4 runs" in run.stdout
    assert [record["status"] for record in sweeping.records(results).values()] == ["ok"] * 4
    assert {record["environment"]["side_by_side"] for record in sweeping.records(results).values()} == {1}
    return results


def wait_for(path, process):
    """Until the file is there; its text."""
    pause = threading.Event()
    while not (path.exists() and path.read_text()):
        assert process.poll() is None, process.communicate()
        pause.wait(0.01)
    return path.read_text()


def wait_until_gone(pid):
    pause = threading.Event()
    while _runs(pid):  # the time limit of the test is the limit
        pause.wait(0.01)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# -- a child dies ------------------------------------------------------------------------------------------


def test_however_a_child_ends_its_replica_has_a_status_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTY", str(tmp_path))
    limit = "budget.time_limit_seconds=4"
    cells = [sweeping.cell(f"attention=broken_{name}") for name in ("system_exit", "segfault", "kill", "linger")]
    cells += [sweeping.cell("attention=broken_exit", "seed=[0,1]"), sweeping.cell("attention=broken_hang", limit)]
    sweep = in_process(tmp_path / "results", cells)
    found: dict[str, list[dict]] = {}
    for record in sweeping.records(tmp_path / "results").values():
        found.setdefault(record["names"]["attention"].removeprefix("broken_"), []).append(record)
    assert found["linger"][0]["environment"]["side_by_side"] == 2
    told = {name: sorted((r["status"], r["reason"]) for r in group) for name, group in found.items()}
    status_0 = "the process ended with status 0 and no record"
    assert told == {
        "system_exit": [("error", f"{status_0}: these were the last words")],
        "segfault": [("error", "the process died by SIGSEGV")],
        "kill": [("killed", "the process was killed (SIGKILL)")],
        "linger": [("ok", "")],
        "exit": [("error", status_0), ("ok", "")],
        "hang": [("timeout", "no result within 4 s; raise budget.time_limit_seconds")],
    }
    assert sum(len(cell.replicas) for cell in cells) == sum(sweep.statuses.values()) == 7  # recorded = planned
    assert not sweep.held and not sweep.running and not sweep.queue
    # a failure is a result: only what nobody is to blame for runs again by itself
    left = [cell.names["attention"] for cell in cells if plan.outstanding(cell, sweep.store)[1]]
    assert left == ["broken_kill"]
    assert len(plan.outstanding(cells[4], sweep.store, ["error"])[1]) == 1


def test_a_search_by_the_first_seed_runs_the_others_at_its_rate_only(tmp_path):
    names = ("broken_gate", "broken_nan", "broken_kill")
    cells = [sweeping.cell(f"attention={name}", "search=first_seed", *GRID) for name in names]
    sweep = in_process(tmp_path / "results", cells)
    found: dict[str, list[tuple[int, str]]] = {}
    for record in sweeping.records(tmp_path / "results").values():
        found.setdefault(record["names"]["attention"].removeprefix("broken_"), []).append(
            (record["seed"], record["status"])
        )
    assert {name: sorted(runs) for name, runs in found.items()} == {
        "gate": [(0, "ok"), (0, "ok"), (1, "ok")],
        "nan": [(0, "nan"), (0, "nan")],  # no rate works
        "kill": [(0, "killed"), (0, "killed")],  # the same command runs them again; this sweep does not wait for it
    }
    assert not sweep.held and not sweep.searched
    rows = sweep.progress.rows
    assert [(rows[cell.id].done, rows[cell.id].planned) for cell in cells] == [(3, 3), (2, 2), (2, 2)]


def test_a_child_that_ends_between_two_replicas_blames_neither(monkeypatch):
    cell = sweeping.cell("seed=[0,1,2]")
    read, write = os.pipe()
    os.set_blocking(read, False)

    class Dead:
        returncode, stdin = -signal.SIGKILL, None

    dead: Any = Dead

    def child(*events):
        made = Child(
            cell=cell,
            todo=list(cell.replicas),
            process=dead,
            events=read,
            errors=io.BytesIO(),
            deadline=0,
            oom_kills=0,
        )
        monkeypatch.setattr("bench.isolation._oom_kills", lambda: oom)
        monkeypatch.setattr(os, "close", lambda descriptor: None)
        for event, replica in events:
            data = {
                "event": event,
                "run_id": cell.replicas[replica].run_id,
                "status": "ok",
                "reason": "",
                "metric": None,
            }
            os.write(write, json.dumps(data).encode() + b"\n")
        os.write(write, b'{"event": "st')  # cut off in the middle of a line
        return made.close()

    oom = 0
    assert child(("start", 0), ("done", 0)).victims == []
    assert child(("start", 0), ("done", 0), ("start", 1)).victims == [cell.replicas[1]]
    assert child().victims == cell.replicas
    assert child(*((event, i) for i in range(3) for event in ("start", "done"))) is None
    assert child(("start", 0)).status == "killed"
    oom = 1
    assert child(("start", 0)).status == "oom"  # the kernel counted one more


# -- the parent dies ---------------------------------------------------------------------------------------


def test_a_sweep_killed_at_random_moments_resumes_to_the_same_table(undisturbed, tmp_path):
    results, dice = tmp_path / "results", random.Random(0)
    runs = results / "runs"
    for round_number in range(5):
        process = sweeping.start(results, "attention=broken_gate", *GRID)
        wanted = round_number  # from before the first record to after the last but one
        pause = threading.Event()
        while process.poll() is None and len([p for p in runs.glob("*") if p.name[0] != "."]) < wanted:
            pause.wait(0.002)
        pause.wait(dice.random() * (1.0 if round_number == 0 else 0.05))
        process.kill()
        process.communicate()
        sweeping.records(results)  # all readable
    run = sweeping.sweep(results, "attention=broken_gate", *GRID)
    assert (run.returncode, run.stderr) == (0, "")
    assert sweeping.table(results) == sweeping.table(undisturbed)
    assert len([path for path in runs.iterdir() if path.name[0] != "."]) == 4  # no run twice


def test_a_child_dies_with_its_parent_even_when_it_holds_the_interpreter_lock(tmp_path):
    process = sweeping.start(tmp_path / "results", "attention=broken_hold", folder=tmp_path)
    pid = int(wait_for(tmp_path / "reached", process))
    assert _runs(pid)
    process.kill()
    process.communicate()
    wait_until_gone(pid)


def test_ctrl_c_records_what_ran_as_interrupted_and_the_rerun_completes(undisturbed, tmp_path):
    results = tmp_path / "results"
    process = sweeping.start(results, "attention=broken_gate", *GRID, folder=tmp_path)
    pid = int(wait_for(tmp_path / "reached", process))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (
        process.returncode == 130
        and err == "interrupted; the same command goes on from here\n"
        and "broken_gate: interrupted: Ctrl-C" in out
    )
    assert not _runs(pid)
    (record,) = sweeping.records(results).values()
    assert (record["status"], record["reason"], record["attempt"]) == ("interrupted", "Ctrl-C", 1)
    run = sweeping.sweep(results, "attention=broken_gate", *GRID)
    assert run.returncode == 0
    assert sweeping.table(results) == sweeping.table(undisturbed)
    after = sweeping.records(results)
    assert after[record["run_id"]]["attempt"] == 2 and sorted(r["attempt"] for r in after.values()) == [1, 1, 1, 2]


# -- the store ---------------------------------------------------------------------------------------------


def test_two_sweeps_at_the_same_time_do_each_run_once(undisturbed, tmp_path):
    results = tmp_path / "results"
    both = [sweeping.start(results, "-m", "attention=broken_gate,none", *GRID) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    folders = [path.name for path in (results / "runs").iterdir() if path.name[0] != "."]
    assert len(folders) == 8 and all(len(name) == 20 for name in folders)  # no second attempts
    table, reference = sweeping.table(results), sweeping.table(undisturbed)
    assert {run_id: table[run_id] for run_id in reference} == reference and len(table) == 8
    for out, err in outputs:
        assert err == "" and out.count("4 runs") == 2  # each reports both cells, done by it or by the other


def test_a_full_disk_is_one_line_and_the_rerun_completes(undisturbed, tmp_path):
    results = tmp_path / "results"

    def limit():  # room for the probe and the small files, not for a record
        resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500))

    run = sweeping.sweep(results, "attention=broken_gate", *GRID, limit=limit)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: cannot write the record of run ") and run.stderr.count("\n") == 1
    assert f" under {results / 'runs'}: File too large" in run.stderr
    assert sweeping.records(results) == {} and [p.name for p in (results / "runs").iterdir()] == [".locks"]
    assert sweeping.sweep(results, "attention=broken_gate", *GRID).returncode == 0
    assert sweeping.table(results) == sweeping.table(undisturbed)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/1/results"])
def test_a_folder_that_cannot_be_written_is_one_line_with_its_path_and_status_2(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    run = sweeping.sweep(tmp_path / "unused", f"results={place}")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"error: cannot write to {tmp_path / place}/runs: ") and run.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_damage_is_set_aside_and_only_that_run_is_done_again(undisturbed, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    before = {path.name: path.stat().st_mtime_ns for path in (results / "runs").glob("*/record.json")}
    flipped, cut = sorted((results / "runs").glob("*/record.json"))[1:3]
    text = bytearray(flipped.read_bytes())
    text[len(text) // 2] ^= 1
    flipped.write_bytes(text)
    cut.write_bytes(cut.read_bytes()[:1000])
    whole = [path for path in (results / "runs").glob("*/record.json") if path not in (flipped, cut)]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole}
    run = sweeping.sweep(results, "attention=broken_gate", *GRID)
    assert run.returncode == 0 and run.stderr.count("the same command runs it again") == run.stderr.count("\n") == 2
    assert sweeping.table(results) == sweeping.table(undisturbed)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole} == before
    assert len(list((results / "quarantine").iterdir())) == 2


def test_what_is_complete_starts_no_child_whatever_lies_in_the_folder(undisturbed, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    cell = sweeping.cell("attention=broken_gate", *GRID)
    (results / "runs" / "notes.txt").write_text("mine")
    (results / "runs" / ".locks" / cell.id).write_bytes(b"\0garbage\xff" * 99)  # what is in a lock does not matter
    monkeypatch.setattr(Child, "start", lambda *_: pytest.fail("a child was started"))
    sweep = in_process(results, [cell])
    assert not sweep.statuses and not sweep.warnings
    assert (results / "runs" / "notes.txt").read_text() == "mine"


def test_a_lock_that_cannot_be_had_is_one_line(tmp_path):
    cell, store = sweeping.cell(), Store(tmp_path / "results")
    store.prepare()
    store.lock_path(cell.id).mkdir()
    with pytest.raises(UserError, match=rf"cannot lock {store.lock_path(cell.id)}: "):
        in_process(store.root, [cell])


def test_a_record_of_a_newer_program_stops_the_sweep_politely_and_stays(undisturbed, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    path = sorted((results / "runs").glob("*/record.json"))[0]
    newer = json.loads(path.read_text()) | {"schema": SCHEMA + 1}
    path.write_text(canonical(newer | {"checksum": checksum(newer)}))
    text = path.read_text()
    with pytest.raises(UserError, match=f"has schema {SCHEMA + 1}, this program reads {SCHEMA}; update the program"):
        in_process(results, [sweeping.cell("attention=broken_gate", *GRID)])
    assert path.read_text() == text and not (results / "quarantine").exists()


def test_a_cell_that_another_sweep_holds_is_waited_for_and_then_found_done(undisturbed, tmp_path, monkeypatch):
    """The other sweep here is this test: it holds the lock, writes the records, lets go."""
    results, cell = tmp_path / "results", sweeping.cell("attention=broken_gate", *GRID)
    store = Store(results)
    store.prepare()
    lock = FileLock(str(store.lock_path(cell.id)))
    lock.acquire()
    waited = []

    def waiting(self, count):
        waited.append(count)
        if len(waited) == 3:
            for folder in (undisturbed / "runs").iterdir():
                shutil.copytree(folder, results / "runs" / folder.name, dirs_exist_ok=True)
            lock.release()

    monkeypatch.setattr(Progress, "waiting", waiting)
    monkeypatch.setattr(Child, "start", lambda *_: pytest.fail("a child was started"))
    assert not in_process(results, [cell]).statuses and waited[:3] == [1, 1, 1]
