"""From text to tokens and to memory-mapped streams of them: bytes, characters, or pairs of bytes merged (BPE).

All are made from train alone and lose nothing, so bits per byte can be compared between them. The last id of every
vocabulary is START, the token in front of each document; predicting it costs, and gives no byte.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tasks import _cache, _corpora
from tasks.base import SPLITS

VERSION = 1  # of how text becomes tokens
LEVELS = "byte", "char", "bpe"
BPE_BYTES = 2**28  # of train that merges are counted on
PIECE = 2**20  # characters that BPE encodes at a time, up to the end of the line


@dataclass(frozen=True)
class Tokenizer:
    """Text as ids.

    Args:
        vocab_size: V, START = V - 1 included.
        num_bytes: [V] of text that a token stands for, float32; 0 for START.
        encode: UTF-8 text (any bytes at the level of bytes) to ids.
        spell: what an id stands for, to be read by people; "" where it is a part of a character.
    """

    vocab_size: int
    num_bytes: np.ndarray
    encode: Callable[[bytes], np.ndarray]
    spell: Callable[[int], str]

    @property
    def start(self) -> int:
        return self.vocab_size - 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest that torch computes with."""
        return np.dtype(np.uint8 if self.vocab_size <= 256 else np.int16 if self.vocab_size <= 2**15 else np.int32)


@dataclass(frozen=True)
class Streams:
    """A tokenized corpus: split -> START, document, START, document, ...; and the text of test."""

    tokenizer: Tokenizer
    tokens: Mapping[str, np.ndarray]
    test_text: bytes


def streams(
    corpus: str, path: str | None, level: str, vocab_size: int | None, limits: Mapping[str, int | None]
) -> Streams:
    """A corpus as tokens, made once for its content and mapped from disk afterwards.

    Args:
        level: byte, char or bpe; vocab_size: of bpe, without START.
        limits: split -> bytes at most, from its beginning; None: all.

    Raises:
        ValueError: no such corpus, level or limit; MissingData: the corpus is not on this machine.
    """
    _corpora.check_corpus(corpus, path)
    if level not in LEVELS:
        near = difflib.get_close_matches(str(level), LEVELS, n=1, cutoff=0.0)[0]
        raise ValueError(f'unknown level "{level}"; nearest: {near}. All of them: {", ".join(LEVELS)}')
    if (vocab_size is not None) != (level == "bpe") or (vocab_size is not None and vocab_size < 256):
        raise ValueError(f"vocab_size must be 256 or more with level=bpe, else null; got {vocab_size} with {level}")
    for split, limit in limits.items():
        if split not in SPLITS or (limit is not None and limit < 1):
            raise ValueError(f"limits: bytes of train, valid and test, 1 or more, or null for all; got {split}={limit}")
    text = dict(_corpora.fingerprint(corpus, path))
    made = dict(level=level, vocab_size=vocab_size, limits={"train": limits.get("train")}, tokenizer=VERSION)

    def parts(split: str) -> Iterator[bytes]:
        return _cut(_corpora.documents(corpus, path)[split], limits.get(split))

    stored = _cache.arrays(text | made | {"part": "vocabulary"}, lambda: _LEVELS[level][0](parts("train"), vocab_size))
    tokenizer = _LEVELS[level][1](stored)
    tokens, kept = {}, {}
    for split in SPLITS:
        key = text | made | {"split": split, "limit": limits.get(split)}
        arrays = _cache.arrays(key, partial(_encoded, parts(split), tokenizer, keep=split == "test"))
        tokens[split], kept[split] = arrays["tokens"], arrays["text"]
        if len(tokens[split]) < 3:
            raise ValueError(f"corpus {corpus} has no text for {split}; a folder needs more or longer files")
    return Streams(tokenizer, tokens, kept["test"].tobytes())


def _cut(texts: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    """Documents up to `limit` bytes in all; the last one ends there, at the start of a UTF-8 character."""
    left = limit
    for text in texts:
        if left is not None and len(text) > left:
            end = _corpora._boundary(text, left)
            if end:
                yield text[:end]
            return
        yield text
        left = None if left is None else left - len(text)


def _encoded(texts: Iterable[bytes], tokenizer: Tokenizer, keep: bool) -> dict[str, np.ndarray]:
    start = np.array([tokenizer.start], tokenizer.dtype)
    parts: list[np.ndarray] = [start[:0]]
    seen = []
    for text in texts:
        parts += [start, tokenizer.encode(text).astype(tokenizer.dtype)]
        if keep:
            seen.append(text)
    return {"tokens": np.concatenate(parts), "text": np.frombuffer(b"".join(seen), np.uint8)}


def _unicode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 ({error.reason}, byte {error.start}); type task.level=byte") from error


# -- the three levels: what is learned from train, and the tokenizer it gives -----------------------


def _no_vocabulary(texts: Iterable[bytes], vocab_size: int | None) -> dict[str, np.ndarray]:
    return {}


def _bytes(stored: Mapping[str, np.ndarray]) -> Tokenizer:
    """256 bytes."""
    return Tokenizer(
        257, np.append(np.ones(256), 0).astype(np.float32), lambda text: np.frombuffer(text, np.uint8), _spelled_byte
    )


def _spelled_byte(i: int) -> str:
    return chr(i) if i < 128 else "·"


def _characters_of(texts: Iterable[bytes], vocab_size: int | None) -> dict[str, np.ndarray]:
    known: set[str] = set()
    for text in texts:
        known.update(_unicode(text))
    return {"points": np.array(sorted(map(ord, known)), np.uint32)}


def _characters(stored: Mapping[str, np.ndarray]) -> Tokenizer:
    """The characters of train; any other one is spelled: 16 tokens are the hexadecimal digits of its UTF-8 bytes."""
    points = np.asarray(stored["points"])
    ids = np.full(0x110000, -1, np.int32)
    ids[points] = np.arange(len(points))

    def encode(text: bytes) -> np.ndarray:
        found = np.frombuffer(_unicode(text).encode("utf-32-le"), "<u4")
        tokens = ids[found]
        unknown = np.flatnonzero(tokens < 0)
        if not len(unknown):
            return tokens
        spelled = [[int(digit, 16) + len(points) for digit in chr(found[i]).encode().hex()] for i in unknown]
        lengths = np.ones(len(tokens), np.int64)
        lengths[unknown] = [len(digits) for digits in spelled]
        tokens = np.repeat(tokens, lengths)
        tokens[tokens < 0] = np.concatenate(spelled)
        return tokens

    def spell(i: int) -> str:
        return chr(points[i]) if i < len(points) else "·"

    sizes = [len(chr(point).encode()) for point in points.tolist()]
    return Tokenizer(len(points) + 17, np.array([*sizes, *[0.5] * 16, 0], np.float32), encode, spell)


def _merges_of(texts: Iterable[bytes], vocab_size: int | None) -> dict[str, np.ndarray]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one process per core
    from tokenizers import Tokenizer as Model
    from tokenizers import models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert vocab_size is not None
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces = (piece for text in _cut(texts, BPE_BYTES) for piece in _pieces(_unicode(text)))
    model.train_from_iterator(pieces, trainer)
    return {"json": np.frombuffer(model.to_str().encode(), np.uint8)}


def _merges(stored: Mapping[str, np.ndarray]) -> Tokenizer:
    """Byte-level BPE as in GPT-2, on words with their leading space; its merges are learned on train."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders

    decoder = decoders.ByteLevel()
    model = Model.from_str(np.asarray(stored["json"]).tobytes().decode())
    names: dict[str, Any] = model.get_vocab()
    sizes = np.zeros(len(names) + 1, np.float32)
    for name, i in names.items():
        sizes[i] = len(name)  # every character of a name is one byte

    def encode(text: bytes) -> np.ndarray:
        ids = [np.array(model.encode(piece).ids, np.int32) for piece in _pieces(_unicode(text))]
        return np.concatenate([np.zeros(0, np.int32), *ids])

    def spell(i: int) -> str:
        return str(decoder.decode([str(model.id_to_token(i))]))

    return Tokenizer(len(sizes), sizes, encode, spell)


def _pieces(text: str) -> Iterator[str]:
    """Text in pieces of a million characters or so, each up to the end of its line: BPE wants much memory."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + PIECE) + 1 or len(text)
        yield text[at:end]
        at = end


_LEVELS = {
    "byte": (_no_vocabulary, _bytes),
    "char": (_characters_of, _characters),
    "bpe": (_merges_of, _merges),
}
