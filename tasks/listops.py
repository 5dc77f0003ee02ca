"""ListOps: the value of a nested expression over digits, from Long Range Arena."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks import _cache
from tasks._batches import in_order, shuffled
from tasks._mqar_segments import whole
from tasks.base import SPLITS, Batch, Metric, PerSequence, Score, Task, TaskSpec, Tokens

OPERATORS = "MIN", "MAX", "MED", "SM"
SYMBOLS = (*"0123456789", *(f"[{name}" for name in OPERATORS), "X")  # X: the closing bracket, as in LRA's loader
BANDS = 4  # of equal width, in which accuracy is reported by length
PROTOCOLS: dict[str, tuple[str, ...]] = {  # vocabulary by id
    "fixed": (*SYMBOLS, "<pad>"),
    "lra": ("<pad>", *SYMBOLS, "<oov>"),
    "s4": ("<pad>", "<unk>", "<eos>", *SYMBOLS),
}


class ListOps(Task):
    """Evaluate `[MAX 2 9 [MIN 4 7 X 0 X`: one of ten values, which no part of the sequence gives away.

    A tree is drawn from the root down. A node is an operator with probability 0.25, as long as its depth is below
    `max_depth`, and a uniform digit otherwise; an operator is MIN, MAX, MED (median, .5 cut off) or SM (sum modulo 10)
    with 2 .. `max_args` children. Trees of min_length .. max_length tokens are kept, brackets counted. Two plateaus are
    no learning: at the published lengths the commonest value is right in 17 % of trees, and looking at the root's
    operator alone in 36 %. `solvers` computes both, and what evaluating the top one, two and three levels gives.

    Example k of a split is stream k of (split, seed); of trees that occur twice the first is kept, test before valid
    before train, so splits are disjoint and `train` does not move `test`.

    Protocols share their trees and differ in the vocabulary and the room they leave:
        fixed: 16 symbols, padding last.
        lra: 17 ids, padding 0, one for unknown symbols that never occurs, max_length + 1 positions (2,000 published).
        s4: 18 ids, an <eos> behind every tree, 2,048 positions.

    Args:
        protocol: fixed, lra or s4.
        min_length, max_length: bounds on the number of tokens; published: 501 and 1999.
        max_depth: depth at which every node is a digit; published: 10, so operators stand at depths 1 .. 9.
        max_args: most children of an operator; published: 10.
        train, valid, test: number of trees; published: 96000, 2000, 2000.

    Raises:
        ValueError: at construction, a setting that has no trees, or in `segments`, fewer different ones than asked for.

    Source: Nangia and Bowman 2018, https://arxiv.org/abs/1804.06028; Tay et al. 2020 (Long Range Arena),
    https://arxiv.org/abs/2011.04006, section 2.2.1, whose text says MEAN where its code has MIN; Gu et al. 2021 (S4),
    https://arxiv.org/abs/2111.00396, for the third protocol. Differs: LRA's published file follows from no seed and its
    vocabulary from the order of a set, so the trees are others under the same law, and ids are fixed.
    """

    version = 1
    name = "listops"
    references = frozenset({"top level", "top 2 levels", "top 3 levels"})

    def __init__(
        self,
        *,
        protocol: str,
        min_length: int,
        max_length: int,
        train: int,
        valid: int,
        test: int,
        max_depth: int = 10,
        max_args: int = 10,
    ):
        if protocol not in PROTOCOLS:
            near = difflib.get_close_matches(str(protocol), PROTOCOLS, n=1, cutoff=0.0)[0]
            raise ValueError(f'unknown protocol "{protocol}"; nearest: {near}. All of them: {", ".join(PROTOCOLS)}')
        given = dict(train=train, valid=valid, test=test)
        least = dict(min_length=4, max_length=4, max_depth=2, max_args=2)
        for name, value in {
            **given,
            **dict(zip(least, (min_length, max_length, max_depth, max_args), strict=True)),
        }.items():
            whole(name, value, least.get(name, 1))
        largest = _longest(max_depth, max_args)
        if not min_length <= min(max_length, largest):
            raise ValueError(
                f"min_length must be at most {min(max_length, largest)}, the longest tree of max_length={max_length}, "
                f"max_depth={max_depth} and max_args={max_args}; got {min_length}"
            )
        if protocol == "s4" and max_length > 2047:
            raise ValueError(
                f"protocol s4 has 2048 positions, the last for <eos>; got max_length={max_length}; nearest: 2047"
            )
        self.protocol, self.symbols, self.numbers = protocol, PROTOCOLS[protocol], given
        self.pad = self.symbols.index("<pad>")
        self.max_length, self.max_depth = max_length, max_depth
        self._law = dict(shortest=min_length, longest=max_length, max_depth=max_depth, max_args=max_args)
        self._width = {"fixed": max_length, "lra": max_length + 1, "s4": 2048}[protocol]
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=len(self.symbols)),
            output=PerSequence(num_classes=10),
            length=self._width,
            causal=False,
            metrics={
                "accuracy": Metric(unit="fraction", higher_is_better=True),
                "loss": Metric(unit="nats", higher_is_better=False),
            },
            primary="accuracy",
            chance=0.1,
        )

    # -- data -------------------------------------------------------------------------------------

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        key = dict(task=self.name, version=self.version, **self._law, numbers=self.numbers, seed=operator.index(seed))
        stored = _cache.arrays(key, lambda: self._draw(seed))
        trees = {name: stored[f"{split}_{name}"] for name in ("tokens", "label", "depth", "length")}
        return [self._batch(**trees)]

    def _draw(self, seed: int) -> dict[str, np.ndarray]:
        """All splits: tokens without padding ids of a protocol, value, depth and length of their trees."""
        from tasks import _listops_data

        seen = np.empty(0, np.uint64)
        made = {}
        for split in reversed(SPLITS):
            parts, found, first = [], 0, 0
            while found < (number := self.numbers[split]):
                count = number - found + 64
                part = _listops_data.trees(f"listops {split} seed={seed}", first, count, **self._law)
                rows = np.sort(np.unique(part["mark"], return_index=True)[1])
                rows = rows[~np.isin(part["mark"][rows], seen)]
                if len(rows) < 0.05 * count:
                    raise ValueError(
                        f"too few different trees have {self._law['shortest']} to {self.max_length} tokens for "
                        f"{sum(self.numbers.values())} examples; type a larger task.max_length or fewer examples"
                    )
                rows = rows[: number - found]
                seen = np.concatenate([seen, part["mark"][rows]])
                parts.append({name: part[name][rows] for name in ("tokens", "label", "depth", "length")})
                found, first = found + len(rows), first + count
            for name in parts[0]:
                made[f"{split}_{name}"] = np.concatenate([part[name] for part in parts])
        return made

    def _batch(self, tokens: np.ndarray, label: np.ndarray, depth: np.ndarray, length: np.ndarray) -> Batch:
        ids = np.array([self.symbols.index(symbol) for symbol in (*SYMBOLS, "<pad>")], np.uint8)
        inputs = np.full((len(tokens), self._width), self.pad, np.uint8)
        np.take(ids, tokens, out=inputs[:, : self.max_length])
        ends = length.astype(np.int64)
        if "<eos>" in self.symbols:
            inputs[np.arange(len(inputs)), ends] = self.symbols.index("<eos>")
            ends = ends + 1
        targets = torch.from_numpy(np.array(label))[:, None]
        return Batch(
            inputs=torch.from_numpy(inputs),
            positions=torch.zeros_like(targets),
            targets=targets,
            key_mask=torch.from_numpy(np.arange(self._width) < ends[:, None]),
            slices={
                "operator": torch.from_numpy(tokens[:, 0] - np.uint8(10)),
                "depth": torch.from_numpy(np.array(depth)),
                "length": torch.from_numpy(np.array(length)),
            },
        )

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        whole("batch_size", batch_size, 1)
        if generator is None:
            yield from in_order(segments, batch_size)
        else:
            yield from shuffled(segments, batch_size, generator)

    def spelled(self, tokens: Tensor) -> list[str]:
        names = {"X": " ]", **{symbol: f" {symbol}" for symbol in SYMBOLS[:-1]}}
        return [names.get(self.symbols[token], "") for token in tokens.tolist()]

    # -- scores -----------------------------------------------------------------------------------

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Accuracy of predictions [N, 1]: over all, by the root's operator, depth of operators, and band of lengths."""
        if predictions.shape != segment.targets.shape:
            raise ValueError(f"predictions must be {list(segment.targets.shape)}, got {list(predictions.shape)}")
        right = (predictions == segment.targets).squeeze(1).double()
        scores = [Score(metric="accuracy", value=right.mean().item(), count=len(right))]
        first = self._law["shortest"]
        span = max(1, -(-(self.max_length - first + 1) // BANDS))
        bands = (segment.slices["length"].long() - first) // span
        names: dict[str, Callable[[int], str]] = {
            "operator": lambda value: OPERATORS[value],
            "depth": str,
            "length": lambda band: f"{first + band * span}-{min(self.max_length, first + (band + 1) * span - 1)}",
        }
        for key, name in names.items():
            values = bands if key == "length" else segment.slices[key]
            for value in values.unique().tolist():
                part = right[values == value]
                slice_ = key, name(value)
                scores.append(Score(metric="accuracy", value=part.mean().item(), count=len(part), slice=slice_))
        return scores

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> Mapping[str, float]:
        """Accuracy on test of: the commonest value; the commonest of the root's operator; the top levels evaluated.

        What stands below those levels is replaced by random digits, the commonest of nine results answers.
        """
        from tasks import _listops_data

        train, test = splits["train"][0], splits["test"][0]
        known, wanted = train.targets[:, 0].cpu().numpy(), test.targets[:, 0].cpu().numpy()
        roots = train.slices["operator"].cpu().numpy()
        by_root = np.array([np.bincount(known[roots == root], minlength=10).argmax() for root in range(len(OPERATORS))])
        lengths = test.slices["length"].cpu().numpy()
        first = self.symbols.index(SYMBOLS[0])
        tokens = test.inputs[:, : self.max_length].cpu().numpy() - np.uint8(first)  # digits 0 .. 9, then operators
        answers = {
            "majority": np.bincount(known).argmax(),
            "root operator": by_root[test.slices["operator"].cpu().numpy()],
        }
        for levels in (1, 2, 3):
            answers[f"top {levels} levels" if levels > 1 else "top level"] = _listops_data.guessed(
                tokens, lengths, levels
            )
        return {name: float((answer == wanted).mean()) for name, answer in answers.items()}


def _longest(max_depth: int, max_args: int) -> int:
    """Tokens of the largest tree: a full one with operators down to depth max_depth - 1."""
    size = 1
    for _ in range(max_depth - 1):
        size = min(2 + max_args * size, 2**31)
    return size
