"""Four-pattern recall: one key-value memory, to be read through each of the four attention patterns."""

from __future__ import annotations

import difflib
import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks._batches import in_order, merge, shuffled
from tasks._mqar_data import Array, Rows, assemble, clean_rows, token_dtype
from tasks._mqar_segments import Segment, read_segments, read_vocabulary, whole
from tasks._recall_scores import recall_scores
from tasks.base import SPLITS, Batch, Metric, PerToken, Score, Task, TaskSpec, Tokens

PATTERNS = "causal_self", "noncausal_self", "noncausal_cross", "causal_cross"


class Recall(Task):
    """K pairs `key value` among fillers, and every key asked once: the same pairs, lengths and floors in each pattern.

    Keys, values, fillers and the order of the questions are drawn by MQAR's law (`tasks/_mqar_data.py`) from a stream
    that does not know the pattern, so example n asks for the same bindings in all four. With K = 2, L = 12, fillers as
    dots, 3 -> 7, 1 -> 9, first asked for 1, then for 3, `M` the mask token:

        causal_self      input    3 7 1 9 1 . 3 . . . . .      MQAR: the answer is due on the key
                         label            9   7
        noncausal_self   input    . . 1 M 3 M 3 7 1 9 . .      masked recall: a question may stand before its pair
                         label          9   7
        noncausal_cross  context  . . . . . . 3 7 1 9 . .      a set of questions reads a context given apart
                         input    1 3      label  9 7
        causal_cross     context  . . . . . . 3 7 1 9 . .      a stream of answers over a context: each is due on its
                         input    1 9 3 7  label  9 . 7 .      key and given as the next input

    All but causal_self turn the sequence by an even number of positions drawn per example, so pairs and questions
    stand anywhere. Values are drawn with replacement, unlike MQAR's: were they distinct, the answers that causal_cross
    has seen would narrow down the next, and the floors would differ. Chance is 1 / (V / 2) in all four.

    A batch mixes lengths, padded on the right under a mask, but in causal_self, where nothing reads behind an answer:
    there, as in MQAR, a batch has one length.

    Args:
        pattern: causal_self, noncausal_self, noncausal_cross or causal_cross.
        vocab_size: V, even: keys 1 .. V/2 - 1, values V/2 .. V - 1; V is the mask, V + 1 the padding.
        train, valid, test: segments {length, num_pairs, num_examples}; length L of the sequence, or of the context.
        power_a: as in MQAR.

    Raises:
        ValueError: at construction, a setting that has no data, in one line with the nearest valid one.

    Source: ours, so that the taxonomy of CAB (Zhang et al. 2022, https://arxiv.org/abs/2210.07661) can be measured
    with one memory; the law of MQAR from Arora et al. 2023, https://arxiv.org/abs/2312.04927.
    """

    version = 1
    name = "recall"
    group = "patterns"

    def __init__(
        self,
        *,
        pattern: str,
        vocab_size: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        power_a: float = 0.01,
    ):
        if pattern not in PATTERNS:
            near = difflib.get_close_matches(str(pattern), PATTERNS, n=1, cutoff=0.0)[0]
            raise ValueError(f'unknown pattern "{pattern}"; nearest: {near}. All of them: {", ".join(PATTERNS)}')
        read_vocabulary(vocab_size, power_a)
        self.protocol, self.vocab_size, self.power_a = pattern, vocab_size, float(power_a)
        self.mask, self.pad = vocab_size, vocab_size + 1
        self._segments = {
            split: read_segments(split, given, vocab_size, published=False)
            for split, given in zip(SPLITS, (train, valid, test), strict=True)
        }
        every = [segment for segments in self._segments.values() for segment in segments]
        longest, most = max(segment.length for segment in every), max(segment.num_pairs for segment in every)
        cross = pattern in ("noncausal_cross", "causal_cross")
        tokens = Tokens(vocab_size=vocab_size + 2)
        self.spec = TaskSpec(
            inputs=tokens,
            output=PerToken(num_classes=vocab_size + 2),
            length={"noncausal_cross": most, "causal_cross": 2 * most}.get(pattern, longest),
            causal=pattern in ("causal_self", "causal_cross"),
            context=tokens if cross else None,
            context_length=longest if cross else None,
            metrics={
                "accuracy": Metric(unit="fraction", higher_is_better=True),
                "loss": Metric(unit="nats", higher_is_better=False),
            },
            primary="accuracy",
            chance=2 / vocab_size,
        )

    def segments(self, split: str, seed: int) -> list[Batch]:
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        return [self._segment(segment, split, seed, i) for i, segment in enumerate(self._segments[split])]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch, every example once."""
        whole("batch_size", batch_size, 1)
        if generator is None:
            yield from in_order(segments, batch_size)
            return
        pools: dict[int, list[Batch]] = {}
        for segment in segments:
            pools.setdefault(segment.inputs.shape[1] if self.protocol == "causal_self" else 0, []).append(segment)
        yield from shuffled([merge(pool, self.pad) for pool in pools.values()], batch_size, generator)

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Accuracy of predictions [N, P] as in MQAR, over all and by slice; `distance` where both are in one sequence.

        It is that from the key of the pair to the position of the answer, in either direction.
        """
        return recall_scores(predictions, segment)

    # -- data -------------------------------------------------------------------------------------

    def _segment(self, segment: Segment, split: str, seed: int, index: int) -> Batch:
        def generator(purpose: str) -> np.random.Generator:
            text = f"{self.name} {purpose} {split} seed={operator.index(seed)} segment={index}"
            return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "little"))

        chunks = clean_rows(segment, self.vocab_size, self.power_a, generator("pairs"), distinct_values=False)
        if self.protocol == "causal_self":
            return assemble(segment, self.vocab_size, chunks)
        shifts = generator("turn")
        parts = [self._restate(segment, rows, shifts) for rows in chunks]
        tensors = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        context = tensors.pop("context", None)
        n, shape = segment.num_examples, tensors["targets"].shape
        return Batch(
            inputs=tensors.pop("inputs"),
            positions=tensors.pop("positions"),
            targets=tensors.pop("targets"),
            context=context,
            slices={
                "pairs": torch.full((n,), segment.num_pairs, dtype=torch.int32),
                "length": torch.full((n,), segment.length, dtype=torch.int32),
                **tensors,
                "order": torch.arange(shape[1], dtype=torch.int16).expand(shape),
            },
        )

    def _restate(self, segment: Segment, rows: Rows, shifts: np.random.Generator) -> dict[str, Array]:
        """Some examples of a pattern other than causal_self, as arrays."""
        n, pairs = rows.keys.shape
        length, dtype = segment.length, token_dtype(self.vocab_size + 2, segment.length)
        pair = np.argsort(rows.slots, axis=1)  # the pair that each question asks for, in the order of asking
        keys, values, slots = (np.take_along_axis(part, pair, 1) for part in rows[:3])
        columns: Array = np.arange(pairs)[None].repeat(n, 0)
        sequence = np.empty((n, length), dtype)
        sequence[:, 0 : segment.context : 2] = rows.keys
        sequence[:, 1 : segment.context : 2] = rows.values
        sequence[:, segment.context :] = rows.filler
        shift = 2 * shifts.integers(length // 2, size=(n, 1))
        if self.protocol == "noncausal_self":
            asked = segment.context + 2 * slots
            np.put_along_axis(sequence, asked, keys.astype(dtype), 1)
            np.put_along_axis(sequence, asked + 1, np.asarray(self.mask, dtype), 1)
            places = (asked + 1 + shift) % length, (2 * pair + shift) % length, values
            turn = np.argsort(places[0], axis=1)  # questions in the order of their places after the turn
            answer, key, values = (np.take_along_axis(part, turn, 1) for part in places)
            extra = {"distance": np.abs(answer - key)}
        elif self.protocol == "noncausal_cross":
            answer, extra = columns, {"inputs": keys}
        else:
            answer, extra = 2 * columns, {"inputs": np.stack([keys, values], axis=2).reshape(n, 2 * pairs)}
        turned = np.take_along_axis(sequence, (np.arange(length) - shift) % length, 1)
        arrays = {"positions": answer, "targets": values, **extra}
        arrays["inputs" if self.protocol == "noncausal_self" else "context"] = turned
        return {name: array.astype(dtype) for name, array in arrays.items()}
