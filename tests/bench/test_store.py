"""The store: whole records or none, whatever is killed, full or flipped; damaged ones are found and set aside."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.store import SCHEMA, DamagedRecord, Store, StoreError, canonical, checksum, digest, read_history, read_record

ROOT = Path(__file__).parents[2]
FILES = {"config.yaml": "task: mqar\n", "history.csv": "step,train_loss\n1,0.5\n2,\n"}


def record(number=0, **fields):
    return {"run_id": digest(number), "status": "ok", "number": number, "loss": 0.1 + number, **fields}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    store.prepare()
    return store


def folders(store):
    return sorted(path.name for path in store.runs.iterdir() if path.name != ".locks")


def test_what_is_written_is_read_with_its_attempt_and_history(store):
    folder = store.write(record(3, nested={"values": [1.5, float("nan"), float("inf")]}), FILES)
    found = read_record(folder)
    assert found["number"] == 3 and found["attempt"] == 1 and found["schema"] == SCHEMA
    assert found["nested"] == {"values": [1.5, None, None]}  # JSON has no words for them
    history = read_history(folder)
    assert history[0] == {"step": 1.0, "train_loss": 0.5} and history[1]["train_loss"] != history[1]["train_loss"]
    assert folders(store) == [digest(3)]


def test_a_second_attempt_supersedes_the_first_and_leaves_it(store):
    first = store.write(record(status="interrupted"), FILES)
    second = store.write(record(status="ok"), FILES)
    assert store.latest(digest(0))["status"] == "ok" and read_record(first)["status"] == "interrupted"
    assert second.name == f"{digest(0)}.2" and store.attempts(digest(0)) == [first, second]
    records, warnings = store.read_all()
    assert [r["attempt"] for r in records] == [2] and warnings == []


def test_a_new_attempt_is_newer_than_every_other_even_when_old_ones_are_gone(store):
    for status in ("killed", "killed", "killed"):
        last = store.write(record(status=status), FILES)
    for folder in store.attempts(digest(0))[:2]:
        store.set_aside(folder, "by hand")
    assert store.attempts(digest(0)) == [last]
    store.write(record(status="ok"), FILES)
    assert store.latest(digest(0))["status"] == "ok" and store.latest(digest(0))["attempt"] == 4


@pytest.mark.parametrize("name", ["record.json", "config.yaml", "history.csv"])
def test_a_flipped_bit_is_found_or_changes_nothing(store, name):
    folder = store.write(record(7), FILES)
    path, before = folder / name, read_record(folder)
    original = path.read_bytes()
    dice, found = random.Random(0), 0
    for _ in range(300):
        place, bit = dice.randrange(len(original)), dice.randrange(8)
        path.write_bytes(original[:place] + bytes([original[place] ^ 1 << bit]) + original[place + 1 :])
        try:
            assert read_record(folder) == before  # white space of another kind
        except DamagedRecord:
            found += 1
    assert found > 250
    path.write_bytes(original)
    assert read_record(folder) == before


@pytest.mark.parametrize("name", ["record.json", "config.yaml", "history.csv"])
def test_a_truncated_or_missing_file_is_set_aside_and_only_that_run_is_gone(store, name):
    store.write(record(1), FILES)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-3]), lambda path: path.unlink()):
        folder = store.write(record(2), FILES)
        damage(folder / name)
        warnings: list[str] = []
        assert store.latest(digest(2), warnings) is None
        assert len(warnings) == 1 and "the same command runs it again" in warnings[0] and "\n" not in warnings[0]
        assert folders(store) == [digest(1)]
    assert len(list((store.root / "quarantine").iterdir())) == 2
    assert [r["number"] for r in store.read_all()[0]] == [1]


def test_a_damaged_attempt_uncovers_the_one_before(store):
    store.write(record(status="error"), FILES)
    (store.write(record(status="ok"), FILES) / "record.json").write_text("")
    assert store.latest(digest(0))["status"] == "error"


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{", "\0", "[" * 100_000, '{"a": Infinity}', '{"a": 1e999}'])
def test_garbage_in_place_of_a_record_is_damage(store, text):
    folder = store.runs / digest(0)
    folder.mkdir()
    (folder / "record.json").write_text(text)
    with pytest.raises(DamagedRecord):
        read_record(folder)
    assert store.read_all()[0] == [] and folders(store) == []


def test_a_record_under_another_name_is_damage(store):
    store.write(record(1), FILES).rename(store.runs / digest(2))
    assert store.latest(digest(2)) is None and folders(store) == []


def test_a_newer_schema_is_refused_in_one_line_and_stays_in_place(store):
    folder = store.write(record(), FILES)
    body = json.loads((folder / "record.json").read_text()) | {"schema": SCHEMA + 1}
    body["checksum"] = checksum(body)
    (folder / "record.json").write_text(canonical(body))
    with pytest.raises(UserError, match=rf"has schema {SCHEMA + 1}, this program reads {SCHEMA}; update the program$"):
        store.read_all()
    assert folders(store) == [digest(0)]


def test_a_record_that_cannot_be_read_now_is_not_called_damaged(store, monkeypatch):
    folder = store.write(record(), FILES)

    def too_many_open_files(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", too_many_open_files)
    with pytest.raises(StoreError, match=r"cannot read .*record\.json: Too many open files"):
        store.latest(digest(0))
    assert folder.exists()


def test_foreign_files_are_ignored(store):
    store.write(record(), FILES)
    for name in (
        "notes.txt",
        ".DS_Store",
        "record.json",
        "A" * 20,
        f"{digest(1)}.old",
        f"{digest(1)}.1",
        f"{digest(1)}.02",
    ):
        (store.runs / name).write_text("mine")
    (store.runs / "folder").mkdir()
    records, warnings = store.read_all()
    assert [r["number"] for r in records] == [0] and warnings == []
    assert len(folders(store)) == 9


def test_an_empty_or_missing_store_has_no_records(tmp_path):
    assert Store(tmp_path / "none").read_all() == ([], [])


def test_writers_at_the_same_time_give_one_attempt_each(store):
    writers = [threading.Thread(target=store.write, args=(record(writer=i), FILES)) for i in range(17)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    attempts = [read_record(folder) for folder in store.attempts(digest(0))]
    assert [r["attempt"] for r in attempts] == list(range(1, 18))
    assert {r["writer"] for r in attempts} == set(range(17)) and len(folders(store)) == 17


WRITER = """
import sys
from pathlib import Path
from bench.store import Store, digest
store, first = Store(Path(sys.argv[1])), int(sys.argv[2])
store.prepare()
print("ready", flush=True)
for number in range(first, 10**9):
    store.write({"run_id": digest(number), "status": "ok", "number": number}, {"history.csv": "x" * 4000})
    print(number, flush=True)
"""


@pytest.mark.fault
def test_a_writer_killed_at_a_random_moment_leaves_whole_records_and_loses_none(tmp_path):
    store, dice, reported = Store(tmp_path / "results"), random.Random(1), []
    for round_number in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.root), str(round_number * 10**6)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        for _ in range(dice.randrange(9)):
            reported.append(int(writer.stdout.readline()))
        timer = threading.Timer(dice.random() * 0.004, os.kill, (writer.pid, signal.SIGKILL))
        timer.start()
        reported += [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.wait()
    records, warnings = store.read_all()
    numbers = {r["number"] for r in records}
    assert warnings == [] and set(reported) <= numbers  # said to be written: on disk, whole
    assert len(numbers) - len(reported) <= 12  # at most the one in the writer's hands each time
    leftovers = [path for path in store.runs.iterdir() if path.name.startswith(".new-")]
    for path in leftovers:
        os.utime(path, (0, 0))
    store.prepare()
    assert not [path for path in store.runs.iterdir() if path.name.startswith((".new-", ".probe-"))]


LIMITED = """
import resource, sys
from pathlib import Path
from bench.errors import run
from bench.store import Store, digest
store = Store(Path(sys.argv[1]))
def main():
    store.prepare()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    store.write({"run_id": digest(0), "status": "ok", "text": "x" * 9000}, {"history.csv": "x" * 500})
run(main)
"""


@pytest.mark.fault
@pytest.mark.parametrize("size", [0, 100, 700, 5000])
def test_a_full_disk_is_one_line_with_the_path_and_leaves_nothing(tmp_path, size):
    store = Store(tmp_path / "results")
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(store.root), str(size)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == f"error: cannot write the record of run {digest(0)} under {store.runs}: File too large\n"
    assert folders(store) == [] and store.read_all() == ([], [])


@pytest.mark.fault
@pytest.mark.parametrize(
    "root", ["a_file", "a_file/below", "/proc/1/results", "/dev/null", "a_store_with_a_file_for_runs"]
)
def test_a_place_that_cannot_be_written_is_one_line_with_the_path(tmp_path, root):
    (tmp_path / "a_file").write_text("in the way")
    (tmp_path / "a_store_with_a_file_for_runs").mkdir()
    (tmp_path / "a_store_with_a_file_for_runs" / "runs").write_text("in the way")
    store = Store(tmp_path / root)
    with pytest.raises(StoreError) as error:
        store.prepare()
    assert str(error.value).startswith(f"cannot write to {store.runs}: ") and "\n" not in str(error.value)
    assert str(error.value).endswith("; choose another folder with results=FOLDER")
    assert (tmp_path / "a_file").read_text() == "in the way"
