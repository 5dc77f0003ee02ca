"""Which predictions of a language model could be recalled from its context: repeated n-grams, and Zoology's AR hits.

Zoology slices the tokens of a text: an AR hit is the last token of a bigram that stands earlier in the context and is
rare in the training text (at most 1,250 times), so it can neither be known by heart nor guessed, only looked up.

Source: Arora et al. 2023, https://arxiv.org/abs/2312.04927, sections 3 and B (the threshold on 10 billion tokens of
the Pile). Differs: n-grams of any length, as a bigram of characters says little; nobody has released such code.
"""

from __future__ import annotations

import numpy as np

CHUNK = 2**22  # tokens compared at a time


def since_last(inputs: np.ndarray, targets: np.ndarray, order: int) -> np.ndarray:
    """Distance from each target back to the end of the last n-gram equal to the one that it ends; 0: there is none.

    Args:
        inputs, targets: [N, L], targets[:, t] follows inputs[:, t]; a negative target is not scored.
        order: n. The n-gram of t is inputs[t - n + 2 .. t], targets[t], and is compared with those of s < t in the row.

    Returns:
        [N, L] int32, t - s for the greatest such s.
    """
    rows, length = targets.shape
    result = np.zeros((rows, length), np.int32)
    first = order - 2  # the first position whose n-gram lies in the row
    if first >= length:
        return result
    step = max(1, CHUNK // length)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes, known = ngrams(inputs[part], targets[part], order)
        _, codes = np.unique(codes, return_inverse=True)
        row, column = np.indices(known.shape)
        key = np.where(known, row * (codes.max() + 1) + codes.reshape(known.shape), -1).ravel()
        by_key = np.argsort(key, kind="stable")
        same = (key[by_key][1:] == key[by_key][:-1]) & (key[by_key][1:] >= 0)
        now, before = by_key[1:][same], by_key[:-1][same]
        gap = np.zeros(key.size, np.int32)
        gap[now] = column.ravel()[now] - column.ravel()[before]
        result[part, first:] = gap.reshape(known.shape)
    return result


def ar_hits(
    inputs: np.ndarray, targets: np.ndarray, train: np.ndarray, order: int, rare: int, since: np.ndarray
) -> np.ndarray:
    """AR hits [N, L], bool: targets that end an n-gram seen before in the row and at most `rare` times in train.

    Args:
        train: the tokens of the training text, in a row.
        since: of these rows, see `since_last`.
    """
    hits = since > 0
    codes, known = ngrams(inputs, targets, order)
    full = np.zeros(targets.shape, np.int64)
    full[:, order - 2 :] = np.where(known, codes, -1)
    hits[hits] = counts_in(train, full[hits], order) <= rare
    return hits


def ngrams(inputs: np.ndarray, targets: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams that the targets from n - 2 on end, and whether they are scored: [N, L - n + 2]."""
    context = [inputs[:, i : inputs.shape[1] - order + 2 + i] for i in range(order - 1)]
    last = targets[:, order - 2 :]
    return _hash([*context, last]), last >= 0


def counts_in(train: np.ndarray, codes: np.ndarray, order: int) -> np.ndarray:
    """How often n-grams with these hashes stand in the training text."""
    wanted, inverse = np.unique(codes, return_inverse=True)
    counts = np.zeros(len(wanted), np.int64)
    if not len(wanted):
        return counts
    for start in range(0, len(train) - order + 1, CHUNK):
        piece = train[start : start + CHUNK + order - 1]
        found = _hash([piece[i : len(piece) - order + 1 + i] for i in range(order)])
        place = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        counts += np.bincount(place[wanted[place] == found], minlength=len(wanted))
    return counts[inverse]


def _hash(columns: list[np.ndarray]) -> np.ndarray:
    """63 bits for several tokens; of ten million n-grams any two share theirs with a probability of 5e-6."""
    total = np.zeros(columns[0].shape, np.uint64)
    for column in columns:
        token = column.astype(np.int64).astype(np.uint64) + np.uint64(1)
        total = (total ^ token) * np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return (total >> np.uint64(1)).astype(np.int64)
