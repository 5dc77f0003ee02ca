"""The settings of MQAR's segments, and why some have no data."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

MAX_VOCAB = 2**24  # drawing filler takes a byte per token and example of a chunk
EXAMPLE = "{length: 64, num_pairs: 4, num_examples: 1000}"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Examples of equal length L and number of pairs K."""

    length: int
    num_pairs: int
    num_examples: int

    @property
    def context(self) -> int:
        """Positions of the pairs, 2K."""
        return 2 * self.num_pairs

    @property
    def num_slots(self) -> int:
        """Places for a query, S = (L - 2K) / 2."""
        return (self.length - self.context) // 2

    def slot_weights(self, power_a: float) -> NDArray[np.float64]:
        return slot_weights(self.num_slots, power_a)


def slot_weights(num_slots: int, power_a: float) -> NDArray[np.float64]:
    """Probability [S] that the first pair is asked in slot i; operations in the published order, for equal bits."""
    weights = power_a * np.arange(1, num_slots + 1) ** (power_a - 1)
    return weights / weights.sum()


def read_segments(split: str, given: object, vocab_size: int, *, published: bool) -> list[Segment]:
    """The segments of a split from its configuration, a list of {length, num_pairs, num_examples}.

    Args:
        published: Zoology's own restriction holds, vocab_size above the length.

    Raises:
        ValueError: a setting that has no data, with the nearest one that has.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"{split} must be a list of one or more segments such as [{EXAMPLE}], got {given!r}")
    return [_read(f"{split}[{i}]", item, vocab_size, published) for i, item in enumerate(given)]


def _read(where: str, given: object, vocab_size: int, published: bool) -> Segment:
    names = [field.name for field in fields(Segment)]
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a segment such as {EXAMPLE}, got {given!r}")
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise ValueError(f'{where} has an unknown key "{key}"; nearest: {near}. All of them: {", ".join(names)}')
    for name in names:
        if name not in given:
            raise ValueError(f"{where} lacks {name}; write for example {EXAMPLE}")
        whole(f"{where}.{name}", given[name], 4 if name == "length" else 1)
    segment = Segment(**given)
    length, pairs, num_keys = segment.length, segment.num_pairs, vocab_size // 2 - 1
    if length % 2:
        raise ValueError(f"{where}.length must be even, got {length}; nearest: {length - 1}, {length + 1}")
    if 4 * pairs > length:
        raise ValueError(
            f"{where}.length must be at least 4 * num_pairs, got length={length} and num_pairs={pairs}; "
            f"nearest: length={4 * pairs} or num_pairs={length // 4}"
        )
    if pairs > num_keys:
        raise ValueError(
            f"{where}.num_pairs must be at most the {num_keys} keys of vocab_size={vocab_size}, got {pairs}; "
            f"nearest: num_pairs={num_keys} or vocab_size={2 * pairs + 2}"
        )
    if published and vocab_size <= length:
        raise ValueError(
            f"{where}.length must be below vocab_size in a published protocol, got length={length} and "
            f"vocab_size={vocab_size}; nearest: length={vocab_size - 2} or vocab_size={length + 2}"
        )
    return segment


def read_vocabulary(vocab_size: object, power_a: object) -> None:
    """Refuse a vocabulary that has no halves, or an exponent without a law of slots."""
    whole("vocab_size", vocab_size, 4)
    assert isinstance(vocab_size, int)
    if vocab_size % 2 or vocab_size > MAX_VOCAB:
        evens = f"{vocab_size - 1}, {vocab_size + 1}" if vocab_size < MAX_VOCAB else MAX_VOCAB
        raise ValueError(
            f"vocab_size must be even (half keys, half values) and at most {MAX_VOCAB}, got {vocab_size}; "
            f"nearest: {evens}"
        )
    if isinstance(power_a, bool) or not isinstance(power_a, (int, float)) or not 0 < power_a <= 10:
        raise ValueError(f"power_a must be a number above 0 and at most 10, got {power_a!r}; published: 0.01")


def whole(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        near = max(least, round(value)) if isinstance(value, float) and math.isfinite(value) else least
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}; nearest: {near}")
