"""Local copies of real data in every format, and one line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from two_sources import PAIRS, ROWS

from tasks import _cache, sources
from tasks._origins import Archive, Hub, Source

pytestmark = pytest.mark.usefixtures("home")
PLAIN = {  # what a format without quotes can hold
    split: {"text": [text.translate({9: 32, 10: 32}) for text in rows["text"]], "label": rows["label"]}
    for split, rows in ROWS.items()
}


def read(path, split, name="reviews"):
    rows = sources.table(name, split, str(path))
    return {column: rows[column][:] for column in rows.column_names}


def saved(folder, form, name):
    """The three splits in one format, under the names of `name`."""
    splits = {split: datasets.Dataset.from_dict(rows) for split, rows in ROWS.items()}
    folder.mkdir()
    if form == "disk":
        datasets.DatasetDict({name[split]: data for split, data in splits.items()}).save_to_disk(str(folder))
        return
    for split, data in splits.items():
        path = str(folder / f"{name[split]}.{form}")
        if form == "parquet":
            data.to_parquet(path)
        elif form in ("csv", "tsv"):
            data.to_csv(path, sep="\t" if form == "tsv" else ",")
        else:
            lines = [{column: values[i] for column, values in ROWS[split].items()} for i in range(len(data))]
            Path(path).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


@pytest.mark.parametrize("form", ["disk", "parquet", "csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("names", [("train", "valid", "test"), ("train", "dev", "test")])
def test_a_copy_in_every_format_gives_the_same_rows(tmp_path, form, names, capfd):
    saved(tmp_path / "copy", form, dict(zip(ROWS, names, strict=True)))
    for split, rows in ROWS.items():
        assert read(tmp_path / "copy", split) == rows


def test_the_hubs_own_files_are_read_without_quotes_and_header(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for split, file in PAIRS.files.items():
        lines = zip(PLAIN[split]["text"], PLAIN[split]["label"], strict=True)
        (folder / Path(file).name).write_text("".join(f"{text}\t{label}\n" for text, label in lines), encoding="utf-8")
    (folder / "test_sample.tsv").write_text("a sample\t1\n")  # lies beside them on the hub and is no split
    for split, rows in PLAIN.items():
        assert read(folder, split, "pairs") == rows


def test_shards_are_joined_in_order_from_the_folder_of_the_configuration(tmp_path, monkeypatch):
    hub = Hub(repository="o/r", revision="r", config="big", splits={"train": "train", "test": "test"}, num_bytes=1)
    monkeypatch.setitem(sources.SOURCES, "reviews", Source(title="", licence="", origin=hub))
    for config, shards in (("big", 3), ("small", 1)):
        folder = tmp_path / "clone" / config
        folder.mkdir(parents=True)
        for i in range(shards):
            data = datasets.Dataset.from_dict({"text": [f"{config} {i}"]})
            data.to_parquet(str(folder / f"train-{i:05d}-of-{shards:05d}.parquet"))
    assert read(tmp_path / "clone", "train") == {"text": ["big 0", "big 1", "big 2"]}
    (tmp_path / "clone" / "big").rename(tmp_path / "clone" / "huge")
    with pytest.raises(
        sources.MissingData, match=r"has files of train in 2 folders; type task\.path=.*huge or another"
    ):
        read(tmp_path / "clone", "train")


def test_shards_may_lie_in_a_folder_named_after_the_split(tmp_path):
    (tmp_path / "copy" / "train").mkdir(parents=True)
    datasets.Dataset.from_dict(ROWS["train"]).to_parquet(str(tmp_path / "copy" / "train" / "0000.parquet"))
    assert read(tmp_path / "copy", "train") == ROWS["train"]


@pytest.mark.parametrize("above", ["test", "train", ".hidden"])
def test_the_name_of_a_folder_above_the_data_says_nothing(tmp_path, above):
    (tmp_path / above).mkdir()
    saved(tmp_path / above / "copy", "parquet", {split: split for split in ROWS})
    saved(tmp_path / "copies", "parquet", {split: split for split in ROWS})
    (tmp_path / "copies").rename(tmp_path / above / above)
    for split, rows in ROWS.items():
        assert read(tmp_path / above / "copy", split) == read(tmp_path / above / above, split) == rows


def test_one_file_or_one_saved_split_is_not_taken_for_all_of_them(tmp_path):
    data = datasets.Dataset.from_dict(ROWS["train"])
    data.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(sources.MissingData, match="is one file and reviews has several splits; type"):
        read(tmp_path / "train.parquet", "test")
    data.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(sources.MissingData, match="holds one split; type"):
        read(tmp_path / "saved", "test")


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_a_split_that_is_not_there_is_one_line(tmp_path, form):
    saved(tmp_path / "copy", form, {"train": "train", "valid": "valid", "test": "exam"})
    with pytest.raises(sources.MissingData) as caught:
        read(tmp_path / "copy", "test")
    assert "\n" not in str(caught.value)
    assert ("has no split test, only train, valid, exam" if form == "disk" else "has no file test") in str(caught.value)


def test_a_damaged_file_is_one_line_that_names_it(tmp_path, capfd):
    saved(tmp_path / "copy", "parquet", {split: split for split in ROWS})
    (tmp_path / "copy" / "test.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(
        sources.MissingData, match=r"cannot read test of reviews in .*copy: .*; correct task\.path"
    ) as caught:
        read(tmp_path / "copy", "test")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, home):
    saved(tmp_path / "copy", "parquet", {split: split for split in ROWS})
    home.write_text("a file in the way")
    with pytest.raises(sources.MissingData, match=f"cannot write to {home}/tables: .*; set {_cache.ROOT}=FOLDER"):
        read(tmp_path / "copy", "test")


def test_every_source_says_what_it_is_and_pins_its_bytes():
    for name, source in sources.SOURCES.items():
        assert source.title and source.licence and source.origin.num_bytes, name
        if isinstance(source.origin, Archive):
            assert len(source.origin.sha256) == 64 and int(source.origin.sha256, 16)
        else:
            assert source.origin.revision
            parts = set(source.origin.splits or source.origin.files)
            assert {"train", "test"} <= parts or len(source.origin.files) == 1, name  # one series is cut by the task
