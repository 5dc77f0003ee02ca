"""How MAD's six skills are drawn, our vectorised laws: [n, L] inputs and labels.

Recall skills are trained on every next token and scored on what can be known, so they give two sets of labels:
`train` says which. Sequences of plain and noisy recall have length - 1 tokens, as published.

Source: Poli et al. 2024 (MAD), https://arxiv.org/abs/2403.17844, section 3; details from the published generators.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks._mqar_data import token_dtype
from tasks._skill_rows import Array, Rows, next_tokens
from tasks.base import IGNORE


def recall(
    rng: np.random.Generator,
    n: int,
    train: bool,
    *,
    vocab_size: int,
    length: int,
    noise_vocab_size: int = 0,
    noise_share: float = 0.0,
) -> Rows:
    """Pairs `key value` of a mapping that the sequence makes up; scored are the values of keys seen before.

    A pair is two noise tokens with probability `noise_share`, all but one drawn pair and the last, which asks again
    for a key that was seen.
    """
    pairs, clear = length // 2, vocab_size - noise_vocab_size
    keys = clear // 2
    row = np.arange(n)
    key = rng.integers(keys, size=(n, pairs))
    noise = rng.random((n, pairs)) < noise_share
    noise[row, rng.integers(pairs - 1, size=n)] = False
    noise[:, -1] = False
    mapping = keys + rng.integers(clear - keys, size=(n, keys))
    seen = np.zeros((n, keys + 1), bool)
    np.put_along_axis(seen, np.where(noise, keys, key)[:, :-1], True, 1)
    key[:, -1] = (rng.random((n, keys)) * seen[:, :keys]).argmax(1)
    tokens = np.stack([key, np.take_along_axis(mapping, key, 1)], axis=2)
    if noise_share:
        tokens = np.where(noise[..., None], rng.integers(clear, vocab_size, size=tokens.shape), tokens)
    tokens = tokens.reshape(n, 2 * pairs).astype(token_dtype(vocab_size, length))
    ago = since_last(np.where(noise, keys + np.arange(pairs), key))
    distance = np.zeros((n, 2 * pairs - 1), tokens.dtype)
    distance[:, ::2] = 2 * ago
    labels = next_tokens(tokens)
    if not train:
        labels[distance == 0] = IGNORE
    return {"inputs": tokens[:, :-1], "labels": labels, "distance": distance}


def fuzzy_recall(
    rng: np.random.Generator, n: int, train: bool, *, vocab_size: int, length: int, max_motif: int
) -> Rows:
    """Recall whose keys and values are tuples without repeats, of 1 .. max_motif tokens, left-padded.

    Keys of `valid` and `test` have max_motif tokens. The last pair asks again for one of the pairs before, so it can
    be answered. What a key maps to is a hash of (example, key): nobody stores the mapping.
    """
    pad, keys = vocab_size - 1, (vocab_size - 1) // 2
    steps = (length + 1 - 2 * max_motif) // 2 + 1
    sizes = rng.integers(1, max_motif + 1, size=(n, steps)) if train else np.full((n, steps), max_motif)
    drawn = [rng.integers(keys - i, size=(n, steps)) for i in range(max_motif)]
    key = np.where(np.arange(max_motif) < sizes[..., None], distinct_tuple(drawn), keys)  # [n, steps, max_motif]
    salt = rng.integers(2**63, size=(n, 1), dtype=np.uint64)
    asked = rng.random(n)
    names = (key * (keys + 1) ** np.arange(max_motif)).sum(-1)
    values = pad - keys
    value_sizes = 1 + (mixed(salt, names, 0) % np.uint64(max_motif)).astype(np.int64)
    ends = np.cumsum(sizes + value_sizes, axis=1)
    count = (ends <= length + 1 - 2 * max_motif).sum(1)  # pairs before the last one
    last = (asked * count).astype(np.int64)
    index = np.where(np.arange(steps) == count[:, None], last[:, None], np.arange(steps))
    sizes, names, value_sizes = (np.take_along_axis(array, index, 1) for array in (sizes, names, value_sizes))
    key = np.take_along_axis(key, index[..., None], 1)
    value = keys + distinct_tuple([(mixed(salt, names, i + 1) % np.uint64(values - i)) for i in range(max_motif)])
    kept = np.arange(steps) <= count[:, None]
    widths = np.where(kept, sizes + value_sizes, 0)
    starts = length + 1 - widths.sum(1)[:, None] + np.cumsum(widths, axis=1) - widths
    repeated = since_last(np.where(kept, names, -1 - np.arange(steps))) > 0
    tokens = np.full((n, length + 1), pad, token_dtype(vocab_size, length))
    scored = np.zeros((n, length + 1), bool)
    for part, offset, size in ((key, 0, sizes), (value, sizes, value_sizes)):
        for i in range(max_motif):
            rows, step = np.nonzero(kept & (i < size))
            places = (starts + offset + i)[rows, step]
            tokens[rows, places] = part[rows, step, i]
            if part is value:
                scored[rows, places] = repeated[rows, step]
    labels = next_tokens(tokens)
    labels[labels == pad if train else ~scored[:, 1:]] = IGNORE
    return {"inputs": tokens[:, :-1], "labels": labels}


def memorization(rng: np.random.Generator, n: int, *, vocab_size: int, length: int, mapping: Array) -> Rows:
    """`key insert` again and again: at the insert token the value is due that the key has in every sequence."""
    key = rng.integers(len(mapping), size=(n, length // 2))
    inputs = np.full((n, length), vocab_size - 1, token_dtype(vocab_size, length))
    inputs[:, ::2] = key
    labels = np.full_like(inputs, IGNORE)
    labels[:, 1::2] = mapping[key]
    return {"inputs": inputs, "labels": labels}


def fixed_mapping(rng: np.random.Generator, vocab_size: int) -> Array:
    """Value of each key 0 .. K - 1: K of the tokens K .. V - 2, K = (V - 1) // 2."""
    keys = (vocab_size - 1) // 2
    return keys + rng.permutation(vocab_size - 1 - keys)[:keys]


def compression(rng: np.random.Generator, n: int, *, vocab_size: int, length: int) -> Rows:
    """Uniform tokens and a closing one, whose state must hold all of them; the closing one is not scored."""
    inputs = rng.integers(vocab_size - 1, size=(n, length), dtype=token_dtype(vocab_size, length))
    inputs[:, -1] = vocab_size - 1
    labels = inputs.copy()
    labels[:, -1] = IGNORE
    return {"inputs": inputs, "labels": labels}


def selective_copying(rng: np.random.Generator, n: int, *, vocab_size: int, length: int, num_copies: int) -> Rows:
    """Tokens spread among blanks, a copy token, and one blank for each of them to be answered in order.

    Where the tokens stand is uniform. `distance`: from a token to its answer.
    """
    body, blank, copy = length - num_copies - 1, vocab_size - 2, vocab_size - 1
    content = rng.integers(blank, size=(n, num_copies), dtype=token_dtype(vocab_size, length))
    places = np.sort(np.argpartition(rng.random((n, body)), num_copies - 1, axis=1)[:, :num_copies], axis=1)
    inputs = np.full((n, length), blank, content.dtype)
    np.put_along_axis(inputs, places, content, 1)
    inputs[:, body] = copy
    labels, distance, order = (np.full_like(inputs, fill) for fill in (IGNORE, 0, 0))
    labels[:, body + 1 :] = content
    distance[:, body + 1 :] = np.arange(body + 1, length) - places
    order[:, body + 1 :] = np.arange(num_copies)
    return {"inputs": inputs, "labels": labels, "distance": distance, "order": order}


def room_to_copy(where: str, *, length: int, num_copies: int, **_: Any) -> None:
    """Refuse a length without a place for every token, the copy token and every answer."""
    if length <= 2 * num_copies + 1:
        raise ValueError(
            f"{where}length must be above 2 * num_copies + 1, got length={length} and num_copies={num_copies}; "
            f"nearest: length={2 * num_copies + 2}"
        )


def since_last(names: Array) -> Array:
    """[n, S]: how many columns ago the same name stood in the row; 0: never."""
    steps = names.shape[1]
    order = np.argsort(names, axis=1, kind="stable")
    ordered = np.take_along_axis(names, order, 1)
    gap = np.zeros_like(order)
    gap[:, 1:] = np.where(ordered[:, 1:] == ordered[:, :-1], order[:, 1:] - order[:, :-1], 0)
    ago = np.zeros((len(names), steps), np.int64)
    np.put_along_axis(ago, order, gap, 1)
    return ago


def distinct_tuple(drawn: list[Array]) -> Array:
    """Tuples without repeats [..., m] from the i-th entry's place among what is left, 0 .. population - 1 - i."""
    digits: list[Array] = []
    for place in drawn:
        digit = place.astype(np.int64)
        for earlier in np.moveaxis(np.sort(np.stack(digits, -1), -1), -1, 0) if digits else ():
            digit = digit + (digit >= earlier)
        digits.append(digit)
    return np.stack(digits, -1)


def mixed(salt: Array, names: Array, purpose: int) -> Array:
    """64 bits that look random of (salt, name, purpose), by the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = salt + names.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(purpose * 0xD1B54A32D192ED03 % 2**64)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
