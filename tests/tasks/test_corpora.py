"""The corpora: what is read as text, and that no split holds what another has."""

import bz2
import shutil
import sys
import zipfile

import numpy as np
import pytest
from datasets import Dataset

from tasks import _corpora
from tasks._corpora import documents, fingerprint, split_documents
from tasks.base import SPLITS
from tasks.sources import MissingData
from tests.tasks.packaged import fetched


def prose(seed, words=400):
    """Text of a vocabulary of 5,000 words, all different from seed to seed."""
    return " ".join(f"w{word}" for word in np.random.default_rng(seed).integers(5000, size=words)).encode()


def read(name, path=None):
    return {split: list(found) for split, found in documents(name, path and str(path)).items()}


@pytest.fixture
def fresh():
    _corpora._read.cache_clear()


@pytest.fixture
def kjv():
    fetched("kjv")
    return read("kjv")


# -- the split ------------------------------------------------------------------------------------


def test_documents_keep_whole_and_go_to_one_split_by_bytes():
    texts = [prose(seed, 50 + seed) for seed in range(200)]
    parts = split_documents(texts)
    assert sorted(text for found in parts.values() for text in found) == sorted(texts)
    sizes = {split: sum(map(len, found)) / sum(map(len, texts)) for split, found in parts.items()}
    assert sizes["train"] == pytest.approx(0.9, abs=0.02) and sizes["valid"] == pytest.approx(0.05, abs=0.02)
    assert split_documents(texts[::-1]) == parts, "the order in which files are found must not matter"


def test_copies_are_left_out_exact_and_near():
    texts = [prose(seed) for seed in range(60)]
    parts = split_documents(texts)
    copied = [b"  " + text.replace(b" ", b"\n", 7) for text in texts]  # other white space is the same text
    again = split_documents(texts + copied)
    assert sum(map(len, again.values())) == 60
    train = parts["train"][0].split()
    near = [b" ".join([*train[:330], b"z%d" % i, *prose(1000 + i, 70).split()]) for i in range(40)]
    mixed = split_documents(texts + near)
    assert any(text in near for text in mixed["train"])
    assert not set(near) & set(mixed["valid"] + mixed["test"])
    far = [b" ".join([*train[:100], *prose(2000 + i, 300).split()]) for i in range(40)]  # a quarter is a quotation
    assert sum(text in far for part in split_documents(texts + far).values() for text in part) == 40


# -- the corpora ----------------------------------------------------------------------------------


def test_the_bible_is_1189_chapters_without_numbers_and_no_test_chapter_is_in_train(kjv):
    every = _corpora._chapters(None)
    assert len(every) == 1189 and not any(digit in text for text in every for digit in b"0123456789[]")
    assert every[0].startswith(b"In the beginning God created the heaven and the earth. And the earth was without form")
    assert every[-1].endswith(b"be with you all. Amen.\n")
    assert abs(len(b"".join(every).decode()) - 4_138_941) < 1000  # counted with a space for every verse number
    assert [len(kjv[split]) for split in SPLITS] == [1068, 55, 65]
    known = {run for text in kjv["train"] for run in _corpora._runs(text).tolist()}
    for text in kjv["valid"] + kjv["test"]:
        own = _corpora._runs(text).tolist()
        assert sum(run in known for run in own) <= 0.5 * len(own)


def test_a_bible_in_the_real_format_is_cut_at_first_verses(tmp_path, fresh):
    file = tmp_path / "plain_text_bible.py"
    file.write_text(
        'bible = Bible(\n    Version.KING_JAMES,\n    """\n1. In the [beginning]. 2.( And the earth) was.\n3. Light.\n'
        '1. Thus the heavens. 2. And on the 1. Next book.""",\n    {1001001: 1})\n'
    )
    chapters = _corpora._chapters(str(file))
    assert chapters == [
        b"In the beginning. ( And the earth) was.\nLight.\n",
        b"Thus the heavens. And on the\n",
        b"Next book.\n",
    ]


def test_the_library_is_python_without_its_tests():
    whole = _corpora._library()
    assert any(b"class OrderedDict" in text for text in whole) and len(whole) > 300
    assert fingerprint("stdlib", None)["python"] == ".".join(map(str, sys.version_info[:3]))
    assert not any(b"class Test_TestLoader" in text for text in whole)


def test_pages_of_a_dump_are_documents(tmp_path, fresh):
    pages = [b"<page>\n <title>%s</title>\n</page>\n" % prose(seed, 30) for seed in range(40)]
    file = tmp_path / "dump.bz2"
    file.write_bytes(bz2.compress(b"<mediawiki>\n<siteinfo/>\n" + b"".join(pages) + b"</mediawiki>"))
    found = read("enwik", file)
    assert sorted(page for part in found.values() for page in part) == sorted(pages) and all(found.values())


def test_enwik8_has_its_standard_split(tmp_path, monkeypatch):
    monkeypatch.setattr(_corpora, "ENWIK8_BYTES", 2000)
    data = np.random.default_rng(0).integers(256, size=2000, dtype=np.uint8).tobytes()
    (tmp_path / "enwik8").write_bytes(data)
    expected = {"train": [data[:1800]], "valid": [data[1800:1900]], "test": [data[1900:]]}
    assert read("enwik8", tmp_path) == read("enwik8", tmp_path / "enwik8") == expected
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("enwik8", data)
    assert read("enwik8", tmp_path / "packed.zip") == expected
    (tmp_path / "enwik8").write_bytes(data[:-1])
    with pytest.raises(MissingData, match="enwik8 has 1,999 bytes and enwik8 2,000"):
        documents("enwik8", str(tmp_path))
    with pytest.raises(MissingData, match=r"type task\.path=FILE"):
        _corpora.check_corpus("enwik8", None)


def test_wikitext_rows_become_articles_as_they_were_published(tmp_path):
    rows = ["", " = First = \n", "", " It is . \n", " = = Section = = \n", " More . \n", " = Second = \n", " End . \n"]
    for split in SPLITS:
        Dataset.from_dict({"text": rows}).to_parquet(str(tmp_path / f"{split}.parquet"))
    found = read("wikitext103", tmp_path)["test"]
    assert b"".join(found).decode() == "".join(row or " \n" for row in rows)
    assert len(found) == 3 and found[1].startswith(b" = First = \n \n") and found[2].startswith(b" = Second = \n")


def test_pg19_rows_are_books(tmp_path):
    for split in SPLITS:
        rows = {
            "short_book_title": ["a", "b"],
            "publication_date": [1900, 1901],
            "url": ["", ""],
            "text": ["x\n", split],
        }
        Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert read("pg19", tmp_path)["valid"] == [b"x\n", b"valid"]


def test_a_file_of_yours_is_cut_between_characters_and_nothing_is_lost(tmp_path, fresh):
    text = "aé—" * 333
    (tmp_path / "book.txt").write_text(text)
    found = read("text", tmp_path / "book.txt")
    assert "".join(found[split][0].decode() for split in SPLITS) == text
    assert len(found["train"][0]) == pytest.approx(0.9 * len(text.encode()), abs=3)


def test_a_folder_of_yours_is_split_by_names_or_by_files(tmp_path, fresh):
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text(name)
    assert read("text", tmp_path) == {split: [f"{split}.txt".encode()] for split in SPLITS}
    (tmp_path / "valid.txt").rename(tmp_path / "test.1.txt")
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "part.txt").write_text("of a folder")
    _corpora._read.cache_clear()
    found = read("text", tmp_path)
    assert (found["train"], found["valid"]) == ([b"train.txt"], [b"of a folder"]) and len(found["test"]) == 2
    (tmp_path / "notes.md").write_text("of no split")
    _corpora._read.cache_clear()
    with pytest.raises(MissingData, match=r"has files of train, valid and test, and notes\.md of none; move it"):
        read("text", tmp_path)
    shutil.rmtree(tmp_path / "valid")
    _corpora._read.cache_clear()
    with pytest.raises(MissingData, match="has files of train and test and none of valid; add them, or rename those"):
        read("text", tmp_path)
    for name in ("train.txt", "test.txt", "test.1.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "training.txt").write_text("a word that begins like a split")
    for name in ("test_model.py", "dev.py"):
        (tmp_path / name).write_text("without train these are no splits")
    for seed in range(40):
        (tmp_path / f"book{seed}.txt").write_bytes(prose(seed))
    _corpora._read.cache_clear()
    before = fingerprint("text", str(tmp_path))
    assert all(len(found) for found in read("text", tmp_path).values())
    (tmp_path / "book7.txt").write_bytes(prose(7) + b" more")
    assert fingerprint("text", str(tmp_path)) != before


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("kvj", None, 'unknown corpus "kvj"; nearest: kjv'),
        ("stdlib", "here", "type task.corpus=text"),
        ("text", None, "type task.path=FILE"),
    ],
)
def test_what_cannot_be_read_is_one_line(name, path, said):
    with pytest.raises(ValueError, match=said):
        _corpora.check_corpus(name, path)
