"""What language modeling and masked language modeling share: a corpus as tokens, and scores by token and by byte."""

from __future__ import annotations

import lzma
import math
import operator
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks import _tokenizers
from tasks.base import IGNORE, SPLITS, Batch, Metric, PerToken, Score, Task, TaskSpec, Tokens

METRICS = {
    "bits_per_byte": Metric(unit="bits per byte", higher_is_better=False),
    "loss": Metric(unit="nats", higher_is_better=False),
    "perplexity": Metric(unit="per token", higher_is_better=False),
    "accuracy": Metric(unit="fraction", higher_is_better=True),
}
ALL = "all", ""


@dataclass(frozen=True, kw_only=True)
class Windows(Batch):
    """A text in windows of equal length, tokens as small integers; labels stand at every position, in order."""

    def labels(self) -> Tensor:
        return self.targets


class LanguageTask(Task):
    """A corpus, tokenized, and what is scored of predictions of its tokens.

    Args:
        corpus: kjv, stdlib, enwik, text, enwik8, wikitext103 or pg19 (tasks/_corpora.py).
        path: a copy of yours, file or folder; null: what `python -m bench.data fetch` brought.
        level: byte, char or bpe (tasks/_tokenizers.py); vocab_size: of bpe, else null.
        length: L, tokens of a window.
        limits: split -> bytes at most, from the beginning of the split; null: all.
        extra: tokens of the vocabulary that text has not.
        longest: window of any split.
    """

    def __init__(
        self,
        *,
        corpus: str,
        path: str | None,
        level: str,
        vocab_size: int | None,
        length: int,
        limits: Mapping[str, int | None],
        causal: bool,
        extra: int = 0,
        longest: int | None = None,
    ):
        if operator.index(length) < 2:
            raise ValueError(f"length must be at least 2 tokens, got {length}")
        self.length = length
        self._streams = _tokenizers.streams(corpus, path, level, vocab_size, limits)
        self.tokenizer = self._streams.tokenizer
        for split in SPLITS:
            if split != "test" and self._streams.tokens[split].size < 2 * length + 1:
                size = self._streams.tokens[split].size
                raise ValueError(f"{split} of {corpus} has {size} tokens and needs two windows of length={length}")
        of = corpus if corpus != "stdlib" else f"stdlib-py{platform.python_version()}"
        self.protocol = f"{of}-{level}{vocab_size or ''}"
        total = self.tokenizer.vocab_size + extra
        tokens = self._streams.tokens["test"][1:]
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=total),
            output=PerToken(num_classes=total),
            length=longest or length,
            causal=causal,
            metrics=METRICS,
            primary="bits_per_byte",
            chance=math.log2(total) * len(tokens) / float(self.tokenizer.num_bytes[tokens].sum()),
        )

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean nats per scored token; output [B, P, V], logits."""
        return F.cross_entropy(output.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)

    def predict(self, output: Tensor, batch: Batch) -> Tensor:
        """[B, P, 2] float32: nats of the target, and whether it was the likeliest token; 0 where nothing is scored."""
        nats = F.cross_entropy(
            output.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        hit = output.argmax(-1) == batch.targets
        return torch.stack([nats.view_as(batch.targets), hit.float()], -1)

    def spelled(self, tokens: Tensor) -> list[str]:
        """Text; > stands for START and _ for a token that text has not."""
        start = self.tokenizer.start
        return [self.tokenizer.spell(i) if i < start else ">_"[i > start] for i in tokens.tolist()]

    def derived(self, scores: Mapping[tuple[str, tuple[str, str]], Score]) -> Iterable[Score]:
        """Perplexity, e to the loss per token, wherever there is a loss."""
        for (metric, where), score in scores.items():
            if metric == "loss":
                yield Score(metric="perplexity", value=math.exp(min(score.value, 700)), count=score.count, slice=where)

    def scores_of(self, predictions: Tensor, targets: Tensor, groups: Iterable[tuple[str, str, Tensor]]) -> list[Score]:
        """Bits per byte, nats and accuracy of groups of tokens.

        Args:
            predictions: [N, P, 2], see `predict`; targets: [N, P].
            groups: (key, value of the slice, [N, P] bool).
        """
        if predictions.shape != (*targets.shape, 2):
            raise ValueError(f"predictions must be {[*targets.shape, 2]}, got {list(predictions.shape)}")
        nats, hit = predictions.double().unbind(-1)
        sizes = torch.from_numpy(np.append(self.tokenizer.num_bytes, 0)).double()  # IGNORE: nothing
        scored = targets != IGNORE
        num_bytes = sizes[torch.where(scored, targets.long(), len(sizes) - 1)]
        scores = []
        for key, value, chosen in groups:
            chosen = chosen & scored
            count, size, total = int(chosen.sum()), float(num_bytes[chosen].sum()), float(nats[chosen].sum())
            if not count:
                continue
            where = (key, value)
            scores.append(Score(metric="loss", value=total / count, count=count, slice=where))
            scores.append(Score(metric="accuracy", value=float(hit[chosen].mean()), count=count, slice=where))
            if size:
                bits = total / math.log(2) / size
                scores.append(Score(metric="bits_per_byte", value=bits, count=round(size), slice=where))
        return scores

    def compressed(self) -> float:
        """Bits per byte of the text of test, packed by xz by itself."""
        text = self._streams.test_text
        return 8 * len(lzma.compress(text, preset=9)) / len(text)

    def _known(self, split: str) -> np.ndarray:
        """The tokens of a split.

        Raises:
            ValueError: an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        return self._streams.tokens[split]


def cut(tokens: np.ndarray, length: int, start: int) -> Windows:
    """All tokens but the first as targets, each once, in windows of `length`; the last one is filled up.

    Args:
        tokens: of a split; start: the id that fills up inputs.
    """
    rows = -(-(len(tokens) - 1) // length)
    short = rows * length - (len(tokens) - 1)
    dtype = np.int16 if tokens.dtype == np.uint8 else tokens.dtype  # IGNORE is negative
    inputs = np.append(tokens[:-1], np.full(short, start, tokens.dtype)).reshape(rows, length)
    targets = np.append(tokens[1:].astype(dtype), np.full(short, IGNORE, dtype)).reshape(rows, length)
    return windows(inputs, targets)


def whole(tokens: np.ndarray, length: int) -> Windows:
    """Windows of `length` that share the memory of the tokens; those left at the end are not used."""
    rows = (len(tokens) - 1) // length
    return windows(tokens[: rows * length].reshape(rows, length), tokens[1 : rows * length + 1].reshape(rows, length))


def windows(inputs: np.ndarray, targets: np.ndarray, **slices: np.ndarray) -> Windows:
    dtype = torch.int16 if inputs.shape[1] < 2**15 else torch.int32
    positions = torch.arange(inputs.shape[1], dtype=dtype).expand(inputs.shape)
    tensors = {name: torch.from_numpy(array) for name, array in slices.items()}
    return Windows(
        inputs=torch.from_numpy(inputs), positions=positions, targets=torch.from_numpy(targets), slices=tensors
    )


def powers(values: Tensor) -> list[tuple[str, Tensor]]:
    """Ranges of values from 1 on, 1, 2-3, 4-7, ..., each with its places, as far as there are any."""
    result = []
    low = 1
    while low <= int(values.max()):
        high = 2 * low - 1
        result.append((str(low) if low == high else f"{low}-{high}", (values >= low) & (values <= high)))
        low *= 2
    return result


def context_of(segments: Sequence[Batch]) -> np.ndarray:
    """The stream that a segment was cut from: its inputs, row by row, and the last target."""
    segment = segments[0]
    inputs, targets = segment.inputs.flatten().numpy(), segment.targets.flatten().numpy()
    scored = int((targets != IGNORE).sum())
    return np.append(inputs[:scored], targets[scored - 1])
