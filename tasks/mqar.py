"""MQAR, multi-query associative recall: a sequence binds keys to values, then asks for each of them once."""

from __future__ import annotations

import difflib
import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks import _mqar_data
from tasks._batches import of_one_length
from tasks._mqar_segments import read_segments, read_vocabulary, whole
from tasks._recall_scores import recall_scores
from tasks.base import SPLITS, Batch, Metric, PerToken, Score, Task, TaskSpec, Tokens

PROTOCOLS = "clean", "zoology_iclr24", "based_mix"


class MQAR(Task):
    """K pairs `key value`, then every key once more, at power-law distances; predict its value on the asking token.

    The law of keys, values and query positions is one for all protocols and stands in `tasks/_mqar_data.py`:

        position   0  1  2  3    4  5  6  7  8  9 10 11       K = 2 pairs, L = 12, fillers as dots
        input      3  7  1  9    1  .  3  .  .  .  .  .
        label                    9     7

    Protocols differ in filler, seeds and order:
        clean: ours. A filler is uniform over all tokens that are not keys of its sequence, drawn by the segment's own
            generator (task, split, seed, index of the segment). It may be a value of the sequence: a key is asked
            once, so what follows a query rebinds nothing that is asked later, while leaving values out would mark the
            filler as filler. Batches mix all segments of equal length (`pairs` vary within a batch, labelled positions
            padded with IGNORE); batches of different lengths come in random order; nothing is padded in length.
        zoology_iclr24: figure 2 of Zoology at the tag `iclr24`: one train and one test segment, filler 0, legacy seeds
            0 and 10, train shuffled.
        based_mix: the mixture of Based and of Zoology since February 2024: seeds from the stream of 123, filler from
            torch's stream of 123, consumed by the train segments and then by the test segments (it can be a key of
            the sequence), contiguous batches, never shuffled: easy to hard in every epoch.

    In the published protocols the data are one published draw: `seed` changes nothing. They have no validation split
    and chose on test; `valid` is drawn by the same law from seeds of its own (20, 21, ...; the next draws of the
    stream of 123, which also seed its filler), so train and test stay bit for bit.

    Only value tokens can be answers, so chance is 1 / (V / 2); guessing among the values seen gives 1 / K.

    Args:
        protocol: clean, zoology_iclr24 or based_mix.
        vocab_size: V, even: keys 1 .. V/2 - 1, values V/2 .. V - 1.
        train, valid, test: segments {length, num_pairs, num_examples}; length even and >= 4 * num_pairs.
        power_a: exponent a of the law of query positions; 1 is uniform, small prefers near ones.

    Raises:
        ValueError: at construction, a setting that has no data, in one line with the nearest valid one.

    Source: Arora et al. 2023 (Zoology), https://arxiv.org/abs/2312.04927; Arora et al. 2024 (Based),
    https://arxiv.org/abs/2402.18668. Accuracy is theirs: mean over examples of each example's accuracy.
    """

    version = 1
    name = "mqar"

    def __init__(
        self,
        *,
        protocol: str,
        vocab_size: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        power_a: float = 0.01,
    ):
        if protocol not in PROTOCOLS:
            near = difflib.get_close_matches(str(protocol), PROTOCOLS, n=1, cutoff=0.0)[0]
            raise ValueError(f'unknown protocol "{protocol}"; nearest: {near}. All of them: {", ".join(PROTOCOLS)}')
        read_vocabulary(vocab_size, power_a)
        self.protocol, self.vocab_size, self.power_a = protocol, vocab_size, float(power_a)
        self._segments = {
            split: read_segments(split, given, vocab_size, published=protocol != "clean")
            for split, given in zip(SPLITS, (train, valid, test), strict=True)
        }
        for split in ("train", "test"):
            if protocol == "zoology_iclr24" and len(self._segments[split]) > 1:
                raise ValueError(
                    f"protocol zoology_iclr24 has one {split} segment, got {len(self._segments[split])}; "
                    "keep one, or type protocol=based_mix or protocol=clean"
                )
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=vocab_size),
            output=PerToken(num_classes=vocab_size),
            length=max(segment.length for segments in self._segments.values() for segment in segments),
            causal=True,
            metrics={
                "accuracy": Metric(unit="fraction", higher_is_better=True),
                "loss": Metric(unit="nats", higher_is_better=False),
            },
            primary="accuracy",
            chance=2 / vocab_size,
        )

    # -- data -------------------------------------------------------------------------------------

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        wanted = self._segments[split]
        law = self.vocab_size, self.power_a
        if self.protocol == "clean":
            return [_mqar_data.clean(s, *law, self._generator(split, seed, i)) for i, s in enumerate(wanted)]
        seeds = self._published_seeds(split)
        if self.protocol == "zoology_iclr24":
            return [_mqar_data.published(s, *law, own, None) for s, own in zip(wanted, seeds, strict=True)]
        stream = torch.Generator().manual_seed(123)
        if split == "test":
            for segment in self._segments["train"]:  # they come first in the stream
                _mqar_data.skip_filler(segment, self.vocab_size, stream)
        return [
            _mqar_data.published(s, *law, own, torch.Generator().manual_seed(own) if split == "valid" else stream)
            for s, own in zip(wanted, seeds, strict=True)
        ]

    def _generator(self, split: str, seed: int, index: int) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.id} {split} seed={operator.index(seed)} segment={index}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _published_seeds(self, split: str) -> list[int]:
        count = {name: len(segments) for name, segments in self._segments.items()}
        if self.protocol == "zoology_iclr24":
            return {"train": [0], "test": [10], "valid": list(range(20, 20 + count["valid"]))}[split]
        return _mqar_data.published_seeds(count)[split]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch, every example once; the order of examples and lengths is the generator's (see the protocols)."""
        whole("batch_size", batch_size, 1)
        return of_one_length(segments, batch_size, None if self.protocol == "based_mix" else generator)

    # -- scoring ----------------------------------------------------------------------------------

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Accuracy of predictions [N, P], over all and by slice.

        Per example (count: examples): `segment` ("64x4", length x pairs), `length`, `pairs`. Per query (count:
        queries): `distance` from the key's first position to its query, and `order` of the query in the sequence,
        both in ranges of powers of two ("16-31").
        """
        return recall_scores(predictions, segment)
