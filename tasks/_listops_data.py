"""Compiled ListOps: trees token by token, their values, and values with the lower levels replaced by dice.

Tokens: digits 0 .. 9, MIN 10, MAX 11, MED 12, SM 13, the closing bracket 14, padding 15. Imported where data are made:
numba takes a second to load, and the loops a few more to compile, once per process.
"""

from __future__ import annotations

import numpy as np

from tasks._counter import below, compiled, key, start, uniform

MIN, MAX, MED, SM, CLOSE, PAD = 10, 11, 12, 13, 14, 15
P_OPERATOR, NUM_OPERATORS = 0.25, 4
ALL = 1 << 30  # levels: the whole tree
PATIENCE = 1_000_000  # trees drawn for one that is accepted; published bounds need 12


@compiled
def _tree(row, shortest, longest, max_depth, max_args, state, left):
    """Draw one tree into `row`; its number of tokens, 0 if it is not accepted, and the depth of its operators.

    Every child that is still owed takes a token at least, and every open bracket one to close it: a tree that must end
    beyond `longest` is given up at once, which changes nothing of the law of those accepted.

    Args:
        left: children still owed by each open bracket; scratch.
    """
    size, depth, deepest, owed = 0, 0, 0, 1
    while owed:
        if depth + 1 < max_depth and uniform(state) < P_OPERATOR:
            row[size] = MIN + below(state, NUM_OPERATORS)
            depth += 1
            left[depth] = 2 + below(state, max_args - 1)
            owed += left[depth] - 1
            deepest = max(deepest, depth)
            size += 1
        else:
            row[size] = below(state, 10)
            size += 1
            owed -= 1
            left[depth] -= 1
            while depth and left[depth] == 0:
                row[size] = CLOSE
                size += 1
                depth -= 1
                left[depth] -= 1
        if size + owed + depth > longest:
            return 0, 0
    return (size, deepest) if size >= shortest else (0, 0)


@compiled
def _value(row, size, levels, state, operators, counts):
    """Value of a tree whose operators below the first `levels` levels are replaced by random digits.

    Args:
        operators, counts: of each open bracket: its operator and how often each digit occurs in it; scratch.
    """
    depth, at = 0, 0
    while True:
        token = row[at]
        at += 1
        if MIN <= token < CLOSE and depth < levels:
            depth += 1
            operators[depth] = token
            counts[depth] = 0
            continue
        if MIN <= token < CLOSE:
            opened = 1
            while opened:
                opened += (MIN <= row[at] < CLOSE) - (row[at] == CLOSE)
                at += 1
            result = below(state, 10)
        elif token == CLOSE:
            result = _apply(operators[depth], counts[depth])
            depth -= 1
        else:
            result = np.int64(token)
        if depth == 0:
            return result
        counts[depth, result] += 1


@compiled
def _apply(operator, count):
    """An operator on arguments given as the number of occurrences of each digit."""
    total, number = 0, 0
    for digit in range(10):
        number += count[digit]
        total += digit * count[digit]
    if operator == SM:
        return total % 10
    # MIN, MAX, and the median as int(): the lower whole number between the two in the middle
    first = 0 if operator == MIN else number - 1 if operator == MAX else (number - 1) // 2
    last = number // 2 if operator == MED else first
    seen, doubled = 0, 0
    for digit in range(10):
        doubled += digit * ((seen <= first < seen + count[digit]) + (seen <= last < seen + count[digit]))
        seen += count[digit]
    return doubled // 2


@compiled
def _fill(tokens, labels, depths, sizes, marks, first, key, shortest, longest, max_depth, max_args):
    """One accepted tree per row, that of stream `first + row`; returns how many were drawn, -1: patience has an end."""
    state = np.zeros(1, np.uint64)
    left, operators = np.zeros(max_depth + 1, np.int64), np.zeros(max_depth + 1, np.int64)
    counts = np.zeros((max_depth + 1, 10), np.int64)
    drawn = 0
    for i in range(len(tokens)):
        start(state, key, first + i)
        size, depth = 0, 0
        last = drawn + PATIENCE
        while size == 0:
            if drawn == last:
                return -1
            drawn += 1
            size, depth = _tree(tokens[i], shortest, longest, max_depth, max_args, state, left)
        tokens[i, size:] = PAD
        labels[i] = _value(tokens[i], size, ALL, state, operators, counts)
        depths[i], sizes[i] = depth, size
        mark = np.uint64(0xCBF29CE484222325)  # FNV-1a, 64 bits
        for t in range(size):
            mark = (mark ^ np.uint64(tokens[i, t])) * np.uint64(0x100000001B3)
        marks[i] = mark
    return drawn


@compiled
def _votes(tokens, sizes, levels, num_votes, max_depth, key, ballot):
    """How often each row takes each value, lower levels drawn anew each time."""
    state = np.zeros(1, np.uint64)
    operators, counts = np.zeros(max_depth + 1, np.int64), np.zeros((max_depth + 1, 10), np.int64)
    for i in range(len(tokens)):
        start(state, key, i)
        for _ in range(num_votes):
            ballot[i, _value(tokens[i], sizes[i], levels, state, operators, counts)] += 1


def trees(
    text: str, first: int, number: int, *, shortest: int, longest: int, max_depth: int, max_args: int
) -> dict[str, np.ndarray]:
    """Accepted trees of streams first .. first + number - 1 under the key of `text`.

    Returns:
        tokens [n, longest] uint8, label, depth and length [n], mark [n] (a hash of the tokens), and how many trees were
        `drawn` for them.

    Raises:
        ValueError: the law gives hardly any tree of such a length.
    """
    made: dict[str, np.ndarray] = dict(
        tokens=np.empty((number, longest), np.uint8),
        label=np.empty(number, np.uint8),
        depth=np.empty(number, np.uint8),
        length=np.empty(number, np.int32),
        mark=np.empty(number, np.uint64),
    )
    drawn = _fill(*made.values(), first, key(text), shortest, longest, max_depth, max_args)
    if drawn < 0:
        raise ValueError(
            f"fewer than one tree in {PATIENCE:,} has {shortest} to {longest} tokens at max_depth={max_depth} and "
            f"max_args={max_args}; type a smaller task.min_length or a larger task.max_args"
        )
    return {**made, "drawn": np.array(drawn)}


def guessed(tokens: np.ndarray, lengths: np.ndarray, levels: int, num_votes: int = 9) -> np.ndarray:
    """The value [n] that most of `num_votes` evaluations of the first `levels` levels give; the lowest of equals."""
    ballot = np.zeros((len(tokens), 10), np.int64)
    depth = int((lengths.max() + 2) // 3)  # an operator, an argument at least and a bracket
    _votes(tokens, lengths, levels, num_votes, depth + 1, key(f"listops dice levels={levels}"), ballot)
    return ballot.argmax(1)
