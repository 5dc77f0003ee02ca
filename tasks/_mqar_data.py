"""How MQAR sequences are drawn: our vectorised law and the published generator, which replays Zoology's stream.

A sequence of length L with K pairs: `key value` K times (the context, 2K positions), then S = (L - 2K) / 2 slots of
two positions. Each key is asked again at the first position of its own slot; the label, its value, stands at that
same position (the model answers on the query token) and never in the input. All other positions are filler.
Keys are distinct tokens of 1 .. V/2 - 1, values distinct tokens of V/2 .. V - 1. Slots are drawn without
replacement, one pair after the other in context order, slot i with weight a (i + 1)^(a - 1): early slots are likely.

Source: Arora et al. 2023 (Zoology), https://arxiv.org/abs/2312.04927, section 4 and appendix; the published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tasks._mqar_segments import Segment
from tasks.base import Batch

Array = NDArray[np.integer]


class Rows(NamedTuple):
    """What decides n sequences: keys, values and slots [n, K] in context order, filler [n, L - 2K]."""

    keys: Array
    values: Array
    slots: Array
    filler: Array


def token_dtype(vocab_size: int, length: int) -> type[np.signedinteger]:
    """The smallest integer type that holds every token and position."""
    return np.int16 if max(vocab_size, length) <= np.iinfo(np.int16).max + 1 else np.int32


def assemble(segment: Segment, vocab_size: int, chunks: Iterator[Rows]) -> Batch:
    """Build the sequences of a segment chunk by chunk; labelled positions ascend, so column = order of the query."""
    dtype = token_dtype(vocab_size, segment.length)
    n, pairs, context = segment.num_examples, segment.num_pairs, segment.context
    inputs = np.empty((n, segment.length), dtype)
    positions, targets, distance = (np.empty((n, pairs), dtype) for _ in range(3))
    bits = pairs.bit_length()
    start = 0
    for rows in chunks:
        now = slice(start, start := start + len(rows.keys))
        inputs[now, 0:context:2] = rows.keys
        inputs[now, 1:context:2] = rows.values
        inputs[now, context:] = rows.filler
        code = rows.slots.astype(np.int64) << bits | np.arange(pairs)
        code.sort(axis=1)
        slot, pair = code >> bits, code & (1 << bits) - 1
        np.put_along_axis(inputs[now, context::2], slot, np.take_along_axis(rows.keys, pair, 1).astype(dtype), 1)
        targets[now] = np.take_along_axis(rows.values, pair, 1)
        positions[now] = context + 2 * slot
        distance[now] = positions[now] - 2 * pair
    return Batch(
        inputs=torch.from_numpy(inputs),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        slices={
            "pairs": torch.full((n,), pairs, dtype=torch.int32),
            "length": torch.full((n,), segment.length, dtype=torch.int32),
            "distance": torch.from_numpy(distance),
            "order": torch.from_numpy(np.arange(pairs, dtype=dtype)).expand(n, pairs),
        },
    )


# -- protocol clean -------------------------------------------------------------------------------

CHUNK = 2**17  # tokens drawn at a time: temporaries stay in cache; part of the data, a change bumps MQAR.version


def clean(segment: Segment, vocab_size: int, power_a: float, rng: np.random.Generator) -> Batch:
    """A segment by our vectorised law; see `MQAR` for the filler."""
    return assemble(segment, vocab_size, clean_rows(segment, vocab_size, power_a, rng))


def clean_rows(
    segment: Segment, vocab_size: int, power_a: float, rng: np.random.Generator, *, distinct_values: bool = True
) -> Iterator[Rows]:
    """Rows of our law, a chunk at a time; without `distinct_values` one value says nothing of the others."""
    pairs, half = segment.num_pairs, vocab_size // 2
    weights = segment.slot_weights(power_a)
    height = max(1, CHUNK // max(segment.length, vocab_size // 8))
    is_key = np.zeros((height, vocab_size), bool)
    for start in range(0, segment.num_examples, height):
        n = min(height, segment.num_examples - start)
        keys = 1 + distinct(rng, n, pairs, half - 1)
        values = half + (distinct(rng, n, pairs, half) if distinct_values else rng.integers(half, size=(n, pairs)))
        slots = race(rng, n, weights)[:, :pairs]
        np.put_along_axis(is_key[:n], keys, True, 1)
        filler = _filler(rng, is_key[:n], segment.length - segment.context, token_dtype(vocab_size, segment.length))
        np.put_along_axis(is_key[:n], keys, False, 1)
        yield Rows(keys, values, slots, filler)


def _filler(rng: np.random.Generator, is_key: NDArray[np.bool_], width: int, dtype: type[np.signedinteger]) -> Array:
    """Tokens [n, width], uniform over those that `is_key` [n, V] does not mark: keys are drawn again."""
    n, vocab_size = is_key.shape
    filler = rng.integers(vocab_size, size=n * width, dtype=dtype)
    origin = np.repeat(np.arange(n, dtype=np.int32) * np.int32(vocab_size), width)
    wrong = np.flatnonzero(is_key.ravel()[origin + filler])
    while len(wrong):
        filler[wrong] = rng.integers(vocab_size, size=len(wrong), dtype=dtype)
        wrong = wrong[is_key.ravel()[origin[wrong] + filler[wrong]]]
    return filler.reshape(n, width)


def distinct(rng: np.random.Generator, n: int, count: int, population: int) -> Array:
    """Uniform ordered tuples without repeats: [n, count] of 0 .. population - 1.

    Repeats are drawn again, the later one of each pair. Only equality of entries decides, so the law does not
    change when tokens swap names: every ordered tuple is equally likely.
    """
    if population < 4 * count:  # repeats would be drawn again too often
        return race(rng, n, np.ones(population))[:, :count]
    drawn = rng.integers(population, size=(n, count), dtype=np.int32)
    bits = count.bit_length()
    column = np.arange(count, dtype=np.int64)
    open_rows = np.arange(n)
    while len(open_rows):
        code = drawn[open_rows].astype(np.int64) << bits | column
        code.sort(axis=1)
        row, rank = np.nonzero(code[:, 1:] >> bits == code[:, :-1] >> bits)
        later = code[row, rank + 1] & (1 << bits) - 1
        drawn[open_rows[row], later] = rng.integers(population, size=len(row), dtype=np.int32)
        open_rows = open_rows[np.unique(row)]
    return drawn


def race(rng: np.random.Generator, n: int, weights: NDArray[np.float64]) -> Array:
    """Successive sampling without replacement, all the way: [n, S] indices in the order drawn.

    Item i arrives after an exponential time of rate weights[i]; the order of arrival is the order of drawing one after
    the other with probability proportional to weight among those left (Yellott 1977). Times are sorted as integers
    whose last bits are the index: positive floats order like their bits.
    """
    bits = len(weights).bit_length()
    code = (rng.standard_exponential((n, len(weights))) / weights).view(np.int64)
    code &= ~((1 << bits) - 1)
    code |= np.arange(len(weights))
    code.sort(axis=1)
    return code & (1 << bits) - 1


# -- protocols zoology_iclr24 and based_mix -------------------------------------------------------


def published(segment: Segment, vocab_size: int, power_a: float, seed: int, filler: torch.Generator | None) -> Batch:
    """A segment bit for bit as Zoology's generator makes it, without its tables of the vocabulary per example.

    Args:
        seed: of numpy's legacy generator, one per segment.
        filler: where random filler comes from, num_examples * length draws of it; None: filler is token 0.
    """
    random = np.random.RandomState(seed)  # its stream is the protocol
    half, dtype = vocab_size // 2, token_dtype(vocab_size, segment.length)
    shape = segment.num_examples, segment.num_pairs
    keys = 1 + first_of_permutations(random, *shape, half - 1).astype(dtype)
    values = half + first_of_permutations(random, *shape, half).astype(dtype)
    slots = power_law_slots(random, *shape, segment.slot_weights(power_a))

    def chunks() -> Iterator[Rows]:
        for now, tokens in _stream(segment, vocab_size, filler):
            yield Rows(keys[now], values[now], slots[now], tokens[:, segment.context :])

    return assemble(segment, vocab_size, chunks())


def published_seeds(counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Seed of every segment in Zoology's framework since February 2024, by the number of segments; `valid` is ours."""
    random = np.random.RandomState(123)  # its stream is the protocol
    bounds = {"train": (0, 2**31), "test": (2**31, 2**32), "valid": (0, 2**32)}
    return {split: random.randint(*bounds[split], size=counts[split], dtype=np.int64).tolist() for split in bounds}


def skip_filler(segment: Segment, vocab_size: int, filler: torch.Generator) -> None:
    """Advance the filler's stream past a segment."""
    for _ in _stream(segment, vocab_size, filler):
        pass


def _stream(segment: Segment, vocab_size: int, filler: torch.Generator | None) -> Iterator[tuple[slice, Array]]:
    """Filler [n, L] for all positions, those of the pairs and queries included, a slice of examples at a time."""
    height = max(1, 2**20 // segment.length)
    for start in range(0, segment.num_examples, height):
        shape = min(height, segment.num_examples - start), segment.length
        tokens = torch.zeros(shape, dtype=torch.int64)
        if filler is not None:
            tokens = torch.randint(vocab_size, shape, generator=filler)
        yield slice(start, start + shape[0]), tokens.numpy()


def first_of_permutations(random: np.random.RandomState, n: int, count: int, population: int) -> Array:
    """[n, count]: the first of one whole permutation per example, as legacy `choice` without replacement draws them."""
    first = np.empty((n, count), np.int32)
    for row in first:
        row[:] = random.permutation(population)[:count]
    return first


def power_law_slots(random: np.random.RandomState, n: int, count: int, weights: NDArray[np.float64]) -> Array:
    """[n, count] slots as legacy `choice` with probabilities draws them: in rounds, each dropping what repeats."""
    first_round = weights.cumsum() / weights.cumsum()[-1]
    slots = np.empty((n, count), np.int32)
    for row in slots:
        found: dict[int, None] = {}  # an ordered set
        distribution = first_round
        while True:
            uniforms = random.random_sample(count - len(found))
            found.update(dict.fromkeys(distribution.searchsorted(uniforms, side="right").tolist()))
            if len(found) == count:
                break
            left = weights.copy()
            left[list(found)] = 0
            distribution = left.cumsum()
            distribution /= distribution[-1]
        row[:] = list(found)
    return slots
