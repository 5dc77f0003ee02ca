"""Zoology's generators of compositional and of forgetting MQAR, bit for bit: numpy's legacy stream, filler 0.

Everything is drawn in whole passes over the examples. Source: the published code of Zoology (Arora et al. 2023,
https://arxiv.org/abs/2312.04927); the paper does not have these two tasks.
"""

from __future__ import annotations

import numpy as np

from tasks._mqar_data import first_of_permutations, power_law_slots
from tasks._mqar_segments import slot_weights
from tasks._skill_rows import Array, Rows
from tasks.base import IGNORE


def compositional(seed: int, n: int, *, vocab_size: int, power_a: float, length: int, num_pairs: int) -> Rows:
    """See `CompositionalMQAR`."""
    random = np.random.RandomState(seed)  # its stream is the protocol
    third, side, context = vocab_size // 3, round(num_pairs**0.5), 3 * num_pairs
    one = 1 + first_of_permutations(random, n, side, third - 1)
    two = third + first_of_permutations(random, n, side, third)
    pair = first_of_permutations(random, n, num_pairs, num_pairs)
    value = 2 * third + first_of_permutations(random, n, num_pairs, vocab_size - 2 * third)
    slots = power_law_slots(random, n, num_pairs, slot_weights((length - context) // 3, power_a))
    return lay_out(
        np.stack([np.take_along_axis(one, pair // side, 1), np.take_along_axis(two, pair % side, 1)], 2),
        value,
        None,
        slots,
        np.zeros((n, length), np.int64),
    )


def forgetting(
    seed: int, n: int, *, vocab_size: int, power_a: float, length: int, num_pairs: int, num_updates: int
) -> Rows:
    """See `ForgettingMQAR`; a new value is compared with the value of another key than its own, as published."""
    random = np.random.RandomState(seed)
    half = vocab_size // 2
    key = 1 + first_of_permutations(random, n, num_pairs, half - 1)
    value = half + first_of_permutations(random, n, num_pairs, vocab_size - half)
    new = np.empty((n, num_updates), np.int64)
    for row in range(n):
        for column in range(num_updates):
            drawn = half + random.choice(vocab_size - half - 1)
            new[row, column] = drawn + (drawn >= value[row, column])  # skips a value, though of another key
    chosen = first_of_permutations(random, n, num_updates, num_pairs)
    context = 2 * (num_pairs + num_updates)
    slots = power_law_slots(random, n, num_pairs, slot_weights((length - context) // 2, power_a))
    return lay_out(key[..., None], value, (chosen, new), slots, np.zeros((n, length), np.int64))


def lay_out(key: Array, value: Array, update: tuple[Array, Array] | None, slots: Array, filler: Array) -> Rows:
    """Sequences from keys [n, K, W] of W tokens, values [n, K], (updated pair, new value) [n, U], slots [n, K].

    The context is `key value` for each pair and then for each update; the key of pair k is asked in its slot of W + 1
    positions (2 and 3 in all uses: a key and a place for nothing), the label stands at its last token. `filler`
    [n, L] is what stands elsewhere; it is written into. `distance`: from the binding that counts to the question.
    """
    n, pairs, size = key.shape
    width = size + 1
    last, since = value.copy(), np.broadcast_to(np.arange(pairs), (n, pairs)).copy()
    shown, told = key, value
    if update is not None:
        chosen, new = update
        np.put_along_axis(last, chosen, new, 1)
        np.put_along_axis(since, chosen, np.broadcast_to(pairs + np.arange(chosen.shape[1]), chosen.shape), 1)
        shown = np.concatenate([key, np.take_along_axis(key, chosen[..., None], 1)], 1)
        told = np.concatenate([value, new], 1)
    context = width * shown.shape[1]
    filler[:, :context] = np.concatenate([shown, told[..., None]], 2).reshape(n, context)
    labels, distance, updated = np.full_like(filler, IGNORE), np.zeros_like(filler), np.zeros_like(filler)
    for part in range(size):
        np.put_along_axis(filler, context + width * slots + part, key[..., part].astype(filler.dtype), 1)
    asked = context + width * slots + size - 1
    np.put_along_axis(labels, asked, last.astype(filler.dtype), 1)
    np.put_along_axis(distance, asked, (asked - width * since - size + 1).astype(filler.dtype), 1)
    np.put_along_axis(updated, asked, (since >= pairs).astype(filler.dtype), 1)
    rows = {"inputs": filler, "labels": labels, "distance": distance, "pairs": np.full(n, pairs, np.int32)}
    return rows if update is None else {**rows, "class": updated}
