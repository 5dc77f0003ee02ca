"""MAD's published data, bit for bit: one stream of random numbers, replayed example by example.

Every `choice` of one item is one bounded integer of the stream, so the arrays that are chosen from need not exist.
Each function gives (tokens, scored): the inputs with, for the recall skills, one token more, and labels of as many.

Source: Poli et al. 2024 (MAD), https://arxiv.org/abs/2403.17844; the order of draws from the published generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import numpy as np

from tasks._skill_rows import Array
from tasks.base import IGNORE

SEED = 12345
Example = tuple[list[int], list[int]]


def draw(skill: str, split: str, counts: Mapping[str, int], setting: Mapping[str, Any]) -> tuple[Array, Array]:
    """Inputs and labels of a split.

    Test follows train in one stream; `valid`, which MAD has not, is drawn by the law of test from a stream of its own.
    Blanks of selective copying come from numpy's global generator there, seeded here as their benchmark seeds it.
    """
    seed = SEED + (split == "valid")
    rng, blanks = np.random.default_rng(seed), np.random.RandomState(seed)
    make: Callable[..., Example] = globals()[skill]
    if skill == "memorization":
        setting = {**setting, "mapping": fixed_mapping(setting["vocab_size"])}
    if skill == "selective_copying":
        setting = {**setting, "blanks": blanks}
    if split == "test":
        for _ in range(counts["train"]):
            make(rng, True, **setting)
    examples = [make(rng, split == "train", **setting) for _ in range(counts[split])]
    tokens, scored = (np.array(part, np.int64) for part in zip(*examples, strict=True))
    if not skill.endswith("recall"):
        return tokens, scored
    return tokens[:, :-1], (tokens if split == "train" else scored)[:, 1:]


def recall(
    rng: np.random.Generator,
    train: bool,
    *,
    vocab_size: int,
    length: int,
    noise_vocab_size: int = 0,
    noise_share: float = 0.0,
) -> Example:
    """In-context recall, with or without noise."""
    clear, pairs = vocab_size - noise_vocab_size, length // 2
    half = clear // 2
    values: dict[int, int] = {}
    tokens: list[int] = []
    scored: list[int] = []
    protected = rng.integers(pairs)
    for i in range(pairs - 1):
        if noise_share > 0 and i != protected and rng.random() < noise_share:
            tokens += [clear + int(token) for token in rng.integers(noise_vocab_size, size=2)]
            scored += [IGNORE, IGNORE]
            continue
        key = int(rng.integers(half))
        known = key in values
        if not known:
            values[key] = half + int(rng.integers(clear - half))
        tokens += [key, values[key]]
        scored += [IGNORE, values[key] if known else IGNORE]
    key = list(values)[rng.integers(len(values))]
    return [*tokens, key, values[key]], [*scored, IGNORE, values[key]]


noisy_recall = recall


def fuzzy_recall(rng: np.random.Generator, train: bool, *, vocab_size: int, length: int, max_motif: int) -> Example:
    """Fuzzy recall; a late probe may never be shown before it is asked, as published."""
    pad = vocab_size - 1
    half = pad // 2
    sizes = range(1, max_motif + 1)

    def shuffled(low: int, high: int, size: int) -> list[tuple[int, ...]]:
        motifs = list(permutations(range(low, high), size))
        rng.shuffle(motifs)
        return motifs

    def key_size() -> int:
        return 1 + int(rng.integers(max_motif)) if train else max_motif

    keys = {size: shuffled(0, half, size) for size in (sizes if train else [max_motif])}
    values = {size: shuffled(half, pad, size) for size in sizes}
    probe_size, answer_size = key_size(), 1 + int(rng.integers(max_motif))
    probe = keys[probe_size][rng.integers(len(keys[probe_size]))]
    answer = values[answer_size][rng.integers(len(values[answer_size]))]
    room = probe_size + answer_size
    place, shown = rng.integers(length - 2 * room), False
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    presented: set[tuple[int, ...]] = set()
    tokens: list[int] = []
    scored: list[int] = []
    while len(tokens) < length - room - 2 * max_motif:
        size, value_size = key_size(), 1 + int(rng.integers(max_motif))
        if len(tokens) >= place and not shown:
            key, value, shown = probe, answer, True
            scored += [IGNORE] * room
        else:
            key = keys[size][rng.integers(len(keys[size]))]
            if key == probe:
                value, shown = answer, True
            else:
                if key not in known:
                    known[key] = values[value_size][rng.integers(len(values[value_size]))]
                value = known[key]
            scored += [IGNORE] * len(key) + (list(value) if key in presented else [IGNORE] * len(value))
        tokens += [*key, *value]
        presented.add(key)
    tokens += [*probe, *answer]
    scored += [IGNORE] * probe_size + list(answer)
    missing = length + 1 - len(tokens)
    return [pad] * missing + tokens, [IGNORE] * missing + scored


def fixed_mapping(vocab_size: int) -> dict[int, int]:
    """Value of each key, in the order in which keys are chosen from: both lists are shuffled and paired."""
    rng = np.random.default_rng(SEED)
    half = (vocab_size - 1) // 2
    keys, values = list(range(half)), list(range(half, vocab_size - 1))
    rng.shuffle(keys)
    rng.shuffle(values)
    return dict(zip(keys, values, strict=False))


def memorization(
    rng: np.random.Generator, train: bool, *, vocab_size: int, length: int, mapping: dict[int, int]
) -> Example:
    """Memorization; one number of the stream goes to a protected pair that only noise would need."""
    rng.integers(length // 2)
    keys = list(mapping)
    chosen = [keys[rng.integers(len(keys))] for _ in range(length // 2)]
    tokens = [token for key in chosen for token in (key, vocab_size - 1)]
    return tokens, [label for key in chosen for label in (IGNORE, mapping[key])]


def compression(rng: np.random.Generator, train: bool, *, vocab_size: int, length: int) -> Example:
    """Compression; the closing token is scored too."""
    tokens = [*rng.integers(vocab_size - 1, size=length - 1).tolist(), vocab_size - 1]
    return tokens, tokens


def selective_copying(
    rng: np.random.Generator,
    train: bool,
    *,
    vocab_size: int,
    length: int,
    num_copies: int,
    blanks: np.random.RandomState,
) -> Example:
    """Selective copying; blanks go before a drawn token, so the last token always stands before the copy token."""
    blank, copy = vocab_size - 2, vocab_size - 1
    content = rng.integers(blank, size=num_copies)
    spread = np.insert(content, blanks.randint(0, num_copies, length - 2 * num_copies - 1), blank)
    tokens = [*spread.tolist(), copy, *[blank] * num_copies]
    return tokens, [IGNORE] * (length - num_copies) + content.tolist()
