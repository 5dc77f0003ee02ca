"""What every task is: a spec, splits of examples, a loss and a score.

Data depend on (task, split, seed) and the order of batches on its generator; neither can see the mechanism.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks import _cache

SPLITS = "train", "valid", "test"
HASHED = 1024  # rows that are hashed at a time: as int64, a data set of bytes can be larger than the memory
IGNORE = -100  # a target that is not scored: padding among the labelled positions


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Integer inputs: 0 .. vocab_size - 1."""

    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Real inputs: `dim` numbers at every position, float32; the last `num_marks` of them tell the time."""

    dim: int
    num_marks: int = 0


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """One class out of `num_classes` at every labelled position."""

    num_classes: int


@dataclass(frozen=True, kw_only=True)
class PerSequence:
    """One class out of `num_classes` for the sequence as a whole; targets are [B, 1], positions do not matter."""

    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Values:
    """`num_values` real numbers at every labelled position; targets are [B, P, num_values], float32."""

    num_values: int


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One class out of `num_classes` at every labelled position, all of them read from the last position's state."""

    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Unit and direction of a metric."""

    unit: str
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a backbone and the report need to know of a task, without its data.

    Args:
        inputs: kind of input.
        output: what is predicted.
        length: longest input of any split, in positions.
        causal: predictions at t may use inputs <= t only.
        context: a second sequence, all of it visible, for cross-attention, or the other one of a pair; None: there is
            none.
        context_length: the longest context.
        grid: rows, columns, ... when every input is an image read pixel by pixel, last axis fastest; None: it is not.
        metrics: name -> unit and direction.
        primary: the metric that ranks, a key of `metrics`.
        chance: value of `primary` that guessing gives, the floor line.
    """

    inputs: Tokens | Vectors
    output: PerToken | PerSequence | Values | Reconstruction
    length: int
    causal: bool
    metrics: Mapping[str, Metric]
    primary: str
    chance: float
    context: Tokens | Vectors | None = None
    context_length: int | None = None
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples of one length, or padded to one; or a whole segment of them.

    Args:
        inputs: [B, L] token ids, or [B, L, F] numbers.
        positions: [B, P] positions that carry a label; padding points at 0 with target IGNORE.
        targets: [B, P] class at each labelled position, or IGNORE; [B, P, V] where values are predicted.
        slices: name -> [B] or [B, P] integer values to report scores by (pairs, length, distance, ...).
        key_mask: [B, L] bool, True at real tokens; None: no padding.
        context: [B, S] or [B, S, F], the second sequence; context_mask [B, S]: as key_mask.
    """

    inputs: Tensor
    positions: Tensor
    targets: Tensor
    slices: Mapping[str, Tensor] = field(default_factory=dict)
    key_mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            inputs=function(self.inputs),
            positions=function(self.positions),
            targets=function(self.targets),
            slices={name: function(value) for name, value in self.slices.items()},
            **{
                name: None if (value := getattr(self, name)) is None else function(value)
                for name in ("key_mask", "context", "context_mask")
            },
        )

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, index: Tensor | slice) -> Batch:
        """The examples at `index`, with the types a model wants: int64, float32 and bool."""

        def wanted(tensor: Tensor) -> Tensor:
            rows = tensor[index]
            return rows.float() if rows.is_floating_point() else rows if rows.dtype is torch.bool else rows.long()

        return self._map(wanted)

    def labels(self) -> Tensor:
        """Targets as a full matrix [B, L], IGNORE where there is none (the layout of published data sets).

        Values stay as they are, [B, P, V].
        """
        if self.targets.is_floating_point():
            return self.targets
        full = torch.full((len(self), self.inputs.shape[1]), IGNORE, dtype=torch.int64)
        rows, columns = torch.nonzero(self.targets != IGNORE, as_tuple=True)
        full[rows, self.positions[rows, columns].long()] = self.targets[rows, columns].long()
        return full

    def sha256(self) -> dict[str, str]:
        """Hashes of inputs, labels and the context, if any, as buffers in C order; see `sha256`."""

        def labels(start: int) -> Tensor:
            return self._map(lambda tensor: tensor[start : start + HASHED]).labels()

        hashes = {"inputs": sha256(self.inputs), "labels": _digest(map(labels, range(0, len(self), HASHED)))}
        return hashes if self.context is None else {**hashes, "context": sha256(self.context)}


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor as a little-endian buffer in C order, int64 or, of real numbers, float32."""
    return _digest(tensor.split(HASHED) if tensor.dim() else [tensor])


def _digest(parts: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        kind = "<f4" if part.is_floating_point() else "<i8"
        digest.update(np.ascontiguousarray(part.cpu().numpy(), dtype=kind).data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number: the mean of `metric` over `count` items of a slice.

    slice: (key, value), or ("all", "") for the whole split. Scores of one slice in several segments are pooled by
    `count`, so a metric that is no mean (perplexity) belongs into `Task.derived`.
    """

    metric: str
    value: float
    count: int
    slice: tuple[str, str] = ("all", "")


class Task(ABC):
    """Data and scoring of one benchmark.

    Class attributes:
        version: bumped when data or scoring change; part of a run's identity.
        name: first half of the id; `protocol` (which published variant) is the second.
        seeded: whether data depend on the seed; a published data set is the same for all.
        references: those of `solvers` that are not trivial, to read scores by: they compute a part of the
            answer, or are given more than the network.
        group: name of the boards that are read together with this task's, such as the four patterns of one memory.
        source: of real data, a name of `tasks.sources`; None: `data` or `corpus` of the YAML says it, or there is none.
    """

    version: ClassVar[int]
    name: ClassVar[str]
    seeded: bool = True
    references: frozenset[str] = frozenset()
    group: ClassVar[str | None] = None
    source: ClassVar[str | None] = None
    protocol: str
    spec: TaskSpec

    @property
    def id(self) -> str:
        return f"{self.name}/{self.protocol}"

    @abstractmethod
    def segments(self, split: str, seed: int) -> Sequence[Batch]:
        """The examples of a split, one Batch per segment of equal length; equal arguments give equal bytes.

        Raises:
            ValueError: an unknown split.
        """

    def unrepeated(self, segments: Sequence[Batch]) -> Sequence[Batch]:
        """The segments of a split without those that cut the same text again, to other lengths."""
        return segments

    @abstractmethod
    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch over `segments`; shuffled by the (CPU) generator, in order when it is None."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats over the labelled positions; output [B, P, C], logits."""
        return F.cross_entropy(output.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)

    def predict(self, output: Tensor, batch: Batch) -> Tensor:
        """What scoring keeps of an output [B, P, C]: the likeliest class [B, P]."""
        return output.argmax(-1)

    @abstractmethod
    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Scores of a whole segment, on the CPU: predictions [N, P] against `segment`."""

    def spelled(self, tokens: Tensor) -> list[str] | None:
        """Tokens [L] as a reader knows them, a text for each of them; None: they stand for nothing else."""
        return None

    def derived(self, scores: Mapping[tuple[str, tuple[str, str]], Score]) -> Iterable[Score]:
        """Scores computed from pooled ones by (metric, slice), such as perplexity from the "loss"."""
        return ()

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> Mapping[str, float]:
        """`spec.primary` on `test` of trivial solvers fitted on `train`, by name; chance stands in the spec."""
        return {}

    def floors(self, splits: Mapping[str, Sequence[Batch]], hashes: Mapping[str, Any]) -> dict[str, float]:
        """`solvers`, computed once for data with these hashes and remembered on this machine."""
        key = dict(solvers=self.id, version=self.version, metric=self.spec.primary, data=hashes)
        return _cache.numbers(key, lambda: self.solvers(splits))
