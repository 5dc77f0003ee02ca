"""What keeps the splits of a corpus apart: exact and near duplicates, and a stratified cut that holds groups together.

Pairs of rows that are too alike make groups; either one row of each group is kept (`distinct`), or all of them go to
one side of the cut (`stratified(groups=...)`). Everything is a function of its arguments: no state, no clock, no hash
seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

PERMUTATIONS = 128  # hash functions of a MinHash signature
MISSED = 1e-3  # largest chance that banding overlooks a pair right at the threshold


def plain(text: str) -> str:
    """Words of a text without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def text_pairs(
    texts: Sequence[str], threshold: float, *, width: int = 5, normalise: Callable[[str], str] = plain
) -> np.ndarray:
    """Pairs of texts that are equal, or whose sets of character shingles overlap by `threshold` or more.

    MinHash with banding finds candidates and their Jaccard index is then computed exactly, so that no pair is reported
    in error; one at the threshold is overlooked with a chance of at most `MISSED`, one above it with less.

    Args:
        texts: the corpus.
        threshold: Jaccard index in (0, 1]; 1: only texts with the same shingles.
        width: of a shingle, in characters; a shorter text is one shingle.
        normalise: what is compared; `plain` ignores case and punctuation, `str` nothing.

    Returns:
        Rows [P, 2], the smaller one first, sorted. Of texts that are equal each is paired with the first only.

    Source: Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900 (shingles, MinHash). Banding: Leskovec, Rajaraman
    and Ullman, Mining of Massive Datasets, section 3.4, http://www.mmds.org.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    first: dict[str, int] = {}
    equal = [(row, i) for i, text in enumerate(map(normalise, texts)) if (row := first.setdefault(text, i)) != i]
    rows = np.fromiter(first.values(), np.int64, len(first))
    shingles = [_shingles(text, width) for text in first]
    candidates = _same_band(np.stack([_signature(s) for s in shingles]), _rows_of_a_band(threshold)) if first else ()
    near = [rows[[a, b]] for a, b in candidates if _jaccard(shingles[a], shingles[b]) >= threshold]
    return _sorted([*equal, *near])


def vector_pairs(vectors: np.ndarray, distance: float) -> np.ndarray:
    """Pairs of rows with equal bytes, or at most `distance` apart (Euclid's).

    Args:
        vectors: [N, ...] numbers; trailing axes are flattened.
        distance: in the unit of the values; 0: equal ones only.

    Returns:
        Rows [P, 2], the smaller one first, sorted. Of rows that are equal each is paired with the first only.
    """
    if distance < 0:
        raise ValueError(f"distance must be 0 or more, got {distance}")
    flat = np.ascontiguousarray(vectors).reshape(len(vectors), -1)
    first: dict[bytes, int] = {}
    equal = [(row, i) for i, vector in enumerate(flat) if (row := first.setdefault(vector.tobytes(), i)) != i]
    rows = np.fromiter(first.values(), np.int64, len(first))
    near: list[np.ndarray] = []
    if distance > 0 and len(rows):
        from sklearn.neighbors import NearestNeighbors

        points = flat[rows].astype(np.float64)
        reach = distance * (1 + 1e-6) + 1e-6  # its distances are rounded; ours decide
        graph = NearestNeighbors(radius=reach, algorithm="brute").fit(points).radius_neighbors_graph(points).tocoo()
        a, b = graph.row[graph.row < graph.col], graph.col[graph.row < graph.col]
        inside = np.array([np.linalg.norm(points[i] - points[j]) <= distance for i, j in zip(a, b, strict=True)], bool)
        near = list(np.stack([rows[a[inside]], rows[b[inside]]], 1))
    return _sorted([*equal, *near])


def groups_of(count: int, pairs: np.ndarray) -> np.ndarray:
    """Number of every row's group [count], its first row; rows joined by a chain of pairs are in one group."""
    groups = np.arange(count)
    while len(pairs):
        lower = groups.copy()
        np.minimum.at(lower, pairs[:, 0], groups[pairs[:, 1]])
        np.minimum.at(lower, pairs[:, 1], groups[pairs[:, 0]])
        lower = lower[lower]
        if (lower == groups).all():
            break
        groups = lower
    return groups


def distinct(count: int, pairs: np.ndarray) -> np.ndarray:
    """The first row of every group, in order: no two of them are a pair."""
    return np.flatnonzero(groups_of(count, pairs) == np.arange(count))


def stratified(
    labels: np.ndarray, shares: Mapping[str, float], *, groups: np.ndarray | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Cut rows into splits that have every class in the same share, each group on one side.

    Groups are taken in a random order, and each goes where its classes are missing most. So splits of single rows are
    off by at most one row in a class, and those of groups by about the size of a group.

    Args:
        labels: class of every row [N], integers.
        shares: split -> share of the rows; they add up to 1.
        groups: number of the group of every row [N]; None: each row for itself.
        seed: of the order.

    Returns:
        Split -> its rows, ascending.
    """
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) < 0:
        raise ValueError(f"shares must be 0 or more and add up to 1, got {dict(shares)}")
    names, classes = np.unique(labels, return_inverse=True)
    numbers, group = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    held = np.zeros((len(numbers), len(names)))  # rows of each class in a group
    np.add.at(held, (group, classes), 1)
    missing = np.array(list(shares.values()))[:, None] * held.sum(0)
    place = np.zeros(len(numbers), dtype=np.int64)
    for g in np.random.default_rng(seed).permutation(len(numbers)):
        place[g] = np.argmax(missing @ held[g])
        missing[place[g]] -= held[g]
    return {split: np.flatnonzero(place[group] == i) for i, split in enumerate(shares)}


# -- MinHash --------------------------------------------------------------------------------------


def _shingles(text: str, width: int) -> np.ndarray:
    """Hashes of the different character shingles of a text, uint64, sorted."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) + np.uint64(1)
    width = max(1, min(width, len(codes)))
    hashes = np.zeros(max(1, len(codes) - width + 1), np.uint64)
    for i in range(width if len(codes) else 0):  # a polynomial modulo 2^64 with an odd base
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + len(hashes)]
    return np.unique(_mixed(hashes))


def _signature(shingles: np.ndarray) -> np.ndarray:
    """The smallest of a text's shingles under each of `PERMUTATIONS` hash functions, uint64."""
    salts = _mixed(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return _mixed(shingles[None] ^ salts[:, None]).min(1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of the 64-bit integers whose output bits each depend on all input bits (xor, shift and multiply)."""
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))


def _rows_of_a_band(threshold: float) -> int:
    """The longest bands that overlook a pair at the threshold with a chance of `MISSED` at most."""
    fits = [r for r in range(1, PERMUTATIONS + 1) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSED]
    return max(fits, default=1)


def _same_band(signatures: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Pairs of texts whose signatures agree in all rows of a band, each once, sorted."""
    found: set[tuple[int, int]] = set()
    for start in range(0, PERMUTATIONS - rows + 1, rows):
        keys = np.ascontiguousarray(signatures[:, start : start + rows]).view(f"V{8 * rows}").ravel()
        _, bucket = np.unique(keys, return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        bucket = bucket[order]
        for step in range(1, len(order)):
            same = bucket[step:] == bucket[:-step]
            if not same.any():
                break
            found.update(zip(order[:-step][same].tolist(), order[step:][same].tolist(), strict=True))
    return sorted(found)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _sorted(pairs: Sequence[tuple[int, int] | np.ndarray]) -> np.ndarray:
    return np.array(sorted(map(tuple, pairs)), dtype=np.int64).reshape(-1, 2)
