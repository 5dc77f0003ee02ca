"""What lands on disk: complete, equal for equal frames, safe to open, whole or absent."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from synthetic import frames, run

from bench import report
from bench.errors import UserError
from bench.report import files, markdown, wording
from bench.report.frames import Frames
from bench.report.leaderboard import boards

DEFAULTS = {"task": "mqar", "backbone": "conv_decoder", "attention": "softmax", "budget": "small"}
SMALL = ("softmax", "hybrid", "none")
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]


def write(data, folder, **options):
    return report.write(data, folder, defaults=DEFAULTS, **options)


def snapshot(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boards")
    return folder, write(frames(SMALL), folder)


def test_all_files_of_a_board_are_written_and_named(small):
    folder, paths = small
    assert all(path.parent == folder / "mqar" for path in paths)
    assert [path.name for path in paths] == [
        "leaderboard.md", "leaderboard.csv", "segments.png", "state.png", "distance_order.png", "learning_rates.png",
        "training_valid.png", "training_loss.png", "runs.csv", "runs.parquet", "scores.csv", "scores.parquet",
        "history.csv", "history.parquet",
    ]  # fmt: skip
    assert sorted(snapshot(folder)) == sorted(f"mqar/{path.name}" for path in paths)  # and no temporary file


def test_writing_again_touches_nothing(small):
    folder, paths = small
    for path in paths:
        os.utime(path, (1, 1))
    assert write(frames(SMALL), folder) == paths
    assert {path.stat().st_mtime for path in paths} == {1}


def test_a_fresh_process_writes_the_same_bytes(small, tmp_path):
    folder, _ = small
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nfrom synthetic import frames\nfrom bench import report\n"
        f"report.write(frames({SMALL!r}), Path(sys.argv[3]), defaults={DEFAULTS!r})\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "271", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", program, str(REPOSITORY), str(HERE), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert snapshot(tmp_path) == snapshot(folder)


def test_pictures_hold_no_date_and_no_version(small):
    _, paths = small
    for path in paths:
        if path.suffix == ".png":
            chunks = set(re.findall(rb"tEXt|iTXt|zTXt|tIME", path.read_bytes()[:2000]))
            assert chunks == set(), path.name


def test_tables_come_back_as_they_were(small):
    _, paths = small
    data = {path.name: path for path in paths}
    expected = frames(SMALL)
    for name in ("runs", "scores", "history"):
        pd.testing.assert_frame_equal(pd.read_parquet(data[f"{name}.parquet"]), getattr(expected, name))
    scores = pd.read_csv(data["scores.csv"], keep_default_na=False)
    assert scores["value"].tolist() == expected.scores["value"].tolist()  # every digit
    table = pd.read_csv(data["leaderboard.csv"])
    assert table["attention"].tolist() == ["softmax", "hybrid", "none", "hyena|long", "nystrom"]
    assert "segment_128x32" in table and not table.columns.duplicated().any()


def test_cells_that_a_spreadsheet_would_run_are_guarded():
    table = pd.DataFrame({"attention": ["=1+1", "+x", "-x", "@x", "\tx", "softmax", "a=b"], "value": [-1.5] * 7})
    lines = files.csv(table).decode().splitlines()[1:]
    assert lines == ["'=1+1,-1.5", "'+x,-1.5", "'-x,-1.5", "'@x,-1.5", "'\tx,-1.5", "softmax,-1.5", "a=b,-1.5"]


CASES = {
    "no run": lambda: Frames.from_rows([], [], []),
    "one run": lambda: frames(("softmax",), seeds=(0,), rates=(0.01,), trouble=False),
    "one seed": lambda: frames(("softmax", "none"), seeds=(0,), trouble=False),
    "all failed": lambda: frames(("softmax", "gla"), fail=("softmax", "gla"), trouble=False),
    "all stale": lambda: frames(("softmax",), stale=True, trouble=False),
    "only the floor": lambda: frames(("none",), trouble=False),
    "died early": lambda: Frames.from_rows([run("x", 0.1, 0, "oom", "")], [], []),
    "no device": lambda: frames(("softmax", "none"), device=None, git_commit=None, git_dirty=None, trouble=False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_report_is_written_whatever_there_is(case, tmp_path):
    data = CASES[case]()
    paths = write(data, tmp_path)
    assert {path.name for path in paths} >= {"leaderboard.md", "leaderboard.csv", "runs.csv"} or case == "no run"
    assert bool(paths) == (case != "no run")
    for path in paths:
        if path.suffix == ".md":
            text = path.read_text()
            assert not re.search(r"\b(None|<NA>|NaT)\b|\[nan|nan\]| nan \|", text), text
    for table in report.tables(data):
        assert render(table)


def test_a_mechanism_without_state_stands_at_zero_bytes(tmp_path):
    names = [path.name for path in write(frames(SMALL[:2], state_bytes=0.0, trouble=False), tmp_path)]
    assert "state.png" in names


def test_pictures_of_former_data_do_not_stay(tmp_path):
    write(frames(("softmax",), seeds=(0,), trouble=False), tmp_path)
    assert (tmp_path / "mqar" / "learning_rates.png").exists()
    (tmp_path / "mqar" / "notes.txt").write_text("mine")
    write(frames(("softmax",), seeds=(0,), rates=(0.01,), trouble=False), tmp_path)
    assert not (tmp_path / "mqar" / "learning_rates.png").exists()
    assert (tmp_path / "mqar" / "notes.txt").exists()


def test_only_writes_the_boards_that_are_asked_for(tmp_path):
    assert write(frames(SMALL), tmp_path, only=[("mqar", "decoder", "small")]) == []
    assert snapshot(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the report to .*--results"):
        write(frames(("none",), seeds=(0,), trouble=False), tmp_path / "file")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    files.save(tmp_path, {"leaderboard.md": b"old"})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.save(tmp_path, {"leaderboard.md": b"new"})
    assert snapshot(tmp_path) == {"leaderboard.md": b"old"}


# -- the page ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    (board,) = boards(frames())
    return markdown.page(board, {"state.png": "against the state"})


def cells(page, heading, attention):
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("|") and f" {attention} " in line]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_page_states_its_conditions(page):
    assert "14 mechanisms × 3 learning rates × 3 seeds = 126 planned: 102 ok, 15 failed, 9 unsupported, 0 miss" in page
    assert "mqar/clean, version 1" in page and "AMD EPYC 7763; float32; torch 2.13.0+cpu" in page
    assert "commit 3f2a9c1d5b" in page and "from 2026-11-21 to 2026-11-23" in page and "with changes" not in page


def test_the_ranking_shows_ties_seeds_intervals_and_failures(page):
    softmax = cells(page, "Ranking", "softmax")
    assert softmax[2:] == ["1.000 [1.000, 1.000]", "1.000 1.000 1.000", "3/3 [0.44, 1.00]", "1.000", "0.01", ""]
    hybrid = cells(page, "Ranking", "hybrid")
    assert re.fullmatch(r"\d+–12", hybrid[0]) and hybrid[3].endswith(" diverged")
    assert cells(page, "Ranking", "retention")[6] == "0.03 ▲"
    assert cells(page, "Ranking", "nystrom")[2] == "unsupported"
    assert cells(page, "Ranking", "(chance)")[2] == "0.008"
    assert cells(page, "Runs without a result", "gla")[1:5] == ["nan", "3", "0.03", "0 1 2"]
    assert cells(page, "Not counted", "linear")[2] == "9"


def test_a_cost_table_of_one_device_does_not_repeat_it(page):
    assert cells(page, "Cost", "based") == ["based", "137 k", "67.1 kB", "500", "125 k", "0.46", "414 MB"]
    (mixed,) = boards(frames(("softmax",), trouble=False))
    mixed.costs.loc[1] = {**mixed.costs.loc[0].to_dict(), "device": "NVIDIA H200"}
    header, lines = markdown.costs(mixed)
    assert header[-1] == "device" and [line[-1] for line in lines] == ["AMD EPYC 7763", "NVIDIA H200"]


def test_warnings_name_missing_runs_lonely_seeds_and_dirty_checkouts():
    data = frames(("softmax", "based"), trouble=False, git_dirty=True)
    few = data.of(data.runs[(data.runs["attention"] == "softmax") | (data.runs["seed"] == 0)])
    (board,) = boards(few)
    lines = " ".join(wording.warnings(board))
    assert "6 runs of the grid are missing" in lines
    assert "Fewer than 3 seeds at the chosen learning rate: based (1)" in lines
    assert "One seed has no interval and ties with every row: based." in lines
    (alone,) = boards(frames(("softmax", "based"), seeds=(0,), trouble=False))
    assert "One seed has no interval: all rows tie." in wording.warnings(alone)
    assert "3f2a9c1d5b with changes" in wording.conditions(board)["Machine"]
    assert "(one seed)" in markdown.page(board, {})


def test_floors_say_what_they_are_and_a_missing_one_is_named(page):
    assert cells(page, "Ranking", "none")[7] == "floor: the network without attention"
    assert cells(page, "Ranking", "short_conv")[7] == "floor: local mixing only"
    assert "Floors not run: uniform; how far a score is above them is unknown." in page
    (board,) = boards(frames(("softmax", "none", "uniform", "short_conv")))
    page = markdown.page(board, {})
    assert "Floors not run" not in page
    assert cells(page, "Ranking", "uniform")[7] == "floor: the mean of all visible values"


def test_the_reason_of_a_cell_that_cannot_run_stands_in_the_page_in_full(page):
    reason = "Nystrom is not defined for causal self attention; it has: noncausal self"
    assert cells(page, "Runs without a result", "nystrom")[1:] == [
        "unsupported",
        "9",
        "0.003 0.01 0.03",
        "0 1 2",
        reason,
    ]
    assert cells(page, "Ranking", "nystrom")[7] == reason[:59] + "…"


def test_names_and_reasons_cannot_break_the_page():
    text = "a|b\n<script>*x*</script> [l](http://e.vil) _y_ `z` snake_case"
    escaped = markdown.escape(text)
    assert "\n" not in escaped and "<" not in escaped and "http://" not in escaped
    assert re.search(r"(?<!\\)([|*`]|\]\()", escaped) is None and "snake_case" in escaped and r"\_y\_" in escaped
    line = markdown.table(["x"], [[text]], left={0}).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == 2


def test_sizes_read_with_three_digits():
    sizes = {0: "0 B", 12: "12 B", 999.6: "1.00 kB", 33_792: "33.8 kB", 999_600: "1.00 MB", 4.1e8: "410 MB"}
    assert {value: wording.size(value, "B") for value in sizes} == sizes
    assert wording.size(float("nan")) == wording.size(None) == "–"


def render(table):
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(table)
    return out.getvalue()


def test_the_terminal_shows_the_same_ranking():
    data = frames()
    data.runs.loc[data.runs["attention"] == "nystrom", "attention"] = "[red]nystrom[/red]"
    (table,) = report.tables(data)
    text = render(table)
    assert re.search(r"1\s+softmax\s+1\.000 \[1\.000, 1\.000\]\s+3/3\s+0\.01\s+131 kB\s+139 k\s+0\.48", text)
    assert "[red]nystrom[/red]: unsupported, Nystrom is not" in text and "102 ok" in text


# -- the command ------------------------------------------------------------------------------------


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "bench.report", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def test_the_command_says_that_there_is_nothing_to_report(tmp_path):
    done = command("--results", str(tmp_path), cwd=REPOSITORY)
    assert (done.returncode, done.stdout.strip()) == (0, report.NOTHING)


def test_the_command_names_a_missing_folder(tmp_path):
    done = command("--results", str(tmp_path / "nope"), cwd=REPOSITORY)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: there is no folder") and "Traceback" not in done.stderr
    )


def test_importing_the_frames_needs_neither_pandas_nor_matplotlib():
    program = (
        "import sys, bench.report.frames; print([m for m in ('pandas', 'matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
