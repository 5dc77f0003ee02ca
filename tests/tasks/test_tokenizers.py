"""Tokens: nothing is lost, vocabularies come from train alone, streams are made once."""

import numpy as np
import pytest

from tasks import _cache, _corpora, _tokenizers
from tasks._tokenizers import streams

TEXTS = {"train": "In the beginning, the word.\n" * 30, "valid": "the end\n", "test": "Æther — the 7th\n"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_cache.ROOT, str(tmp_path / "cache"))
    _corpora._read.cache_clear()
    home = tmp_path / "texts"
    home.mkdir()
    for split, text in TEXTS.items():
        (home / f"{split}.txt").write_text(text)
    return str(home)


def make(folder, level, vocab_size=None, **limits):
    return streams("text", folder, level, vocab_size, limits)


def test_bytes_are_themselves(folder):
    made = make(folder, "byte")
    assert made.tokenizer.vocab_size == 257 and made.tokens["test"].dtype == np.int16
    assert made.tokens["test"][0] == 256 and bytes(made.tokens["test"][1:].tolist()) == TEXTS["test"].encode()
    assert made.test_text == TEXTS["test"].encode()


def test_characters_are_those_of_train_and_others_are_spelled(folder):
    made = make(folder, "char")
    letters = sorted(set(TEXTS["train"]))
    assert made.tokenizer.vocab_size == len(letters) + 17 and made.tokens["train"].dtype == np.uint8
    text, spelled = "", ""
    for token in made.tokens["test"][1:].tolist():
        if token < len(letters):
            text += bytes.fromhex(spelled).decode() + letters[token]
            spelled = ""
        else:
            spelled += f"{token - len(letters):x}"
    assert text == TEXTS["test"]


def test_merges_are_learned_from_train_and_lose_nothing(folder):
    made = make(folder, "bpe", 300)
    stored = _tokenizers._merges_of([TEXTS["train"].encode()], 300)
    assert (stored["json"] == _tokenizers._merges_of([TEXTS["train"].encode()], 300)["json"]).all()
    from tokenizers import Tokenizer, decoders

    model = Tokenizer.from_str(stored["json"].tobytes().decode())
    model.decoder = decoders.ByteLevel()
    for split, text in TEXTS.items():
        assert model.decode(made.tokens[split][1:].tolist()) == text
    assert len(made.tokens["train"]) < len(TEXTS["train"]) / 3
    assert any(name.endswith("beginning") for name in model.get_vocab())


@pytest.mark.parametrize(("level", "vocab_size"), [("byte", None), ("char", None), ("bpe", 300)])
def test_bytes_of_tokens_add_up_to_those_of_the_text(folder, level, vocab_size):
    made = make(folder, level, vocab_size)
    for split, text in TEXTS.items():
        assert made.tokenizer.num_bytes[made.tokens[split]].sum() == len(text.encode())
    assert made.tokenizer.num_bytes[made.tokenizer.start] == 0 and made.tokenizer.start == made.tokens["test"][0]


def test_limits_cut_at_characters(folder):
    assert list(_tokenizers._cut([b"ab", "cé".encode(), b"d"], 4)) == [b"ab", b"c"]
    assert list(_tokenizers._cut([b"ab", b"cd"], None)) == [b"ab", b"cd"]
    assert make(folder, "byte", test=5).test_text == TEXTS["test"].encode()[:5]


def test_pieces_end_with_lines(monkeypatch):
    monkeypatch.setattr(_tokenizers, "PIECE", 5)
    text = "one\ntwo three\n\nfour five six\nseven"
    assert "".join(_tokenizers._pieces(text)) == text
    assert list(_tokenizers._pieces(text)) == ["one\ntwo three\n", "\nfour five six\n", "seven"]


def test_streams_are_mapped_from_disk_and_follow_the_file(folder, tmp_path):
    first = make(folder, "byte").tokens["valid"]
    again = make(folder, "byte").tokens["valid"]
    assert isinstance(again, np.memmap) and (first == again).all()
    (tmp_path / "texts" / "valid.txt").write_text("another end\n")
    _corpora._read.cache_clear()
    assert len(make(folder, "byte").tokens["valid"]) == 13


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(level="bytes"), 'unknown level "bytes"; nearest: byte'),
        (dict(level="bpe"), "vocab_size must be 256 or more with level=bpe"),
        (dict(level="bpe", vocab_size=100), "vocab_size must be 256 or more"),
        (dict(level="char", vocab_size=300), "else null"),
        (dict(level="byte", dev=3), "limits: bytes of train, valid and test"),
        (dict(level="byte", test=0), "got test=0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(folder, given, said):
    with pytest.raises(ValueError, match=said):
        make(folder, **given)


def test_text_that_is_not_utf8_wants_bytes(folder, tmp_path):
    (tmp_path / "texts" / "valid.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match=r"not UTF-8 .*byte 2\); type task.level=byte"):
        make(folder, "char")
