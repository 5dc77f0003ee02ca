"""Masked language modeling: the hidden tokens of a real text, from both sides."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks._batches import in_order
from tasks._count_models import FIT, interpolated
from tasks._language import ALL, LanguageTask, context_of, whole
from tasks.base import Batch, Score

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1  # of a window; of those, and the rest keep their token
KINDS = "masked", "random", "kept"


class MaskedLanguageModeling(LanguageTask):
    """Predict 15 % of the tokens of a window, of which 80 % are masked, 10 % another token and 10 % as they were.

    A window of L tokens has round(0.15 L) of them, at least one, anywhere; what replaces one is drawn from the whole
    vocabulary of the text, so it may be the token itself. Those of valid and test are fixed by split and seed, those
    of train drawn anew every epoch, as are the offset of the windows and their order (see `tasks.lm`). Of valid and
    test, what is left over behind the last window is not used.

    Scores are bits per byte of the hidden tokens, nats, perplexity and accuracy of them; sliced by `class`: masked,
    random or kept.

    Args:
        corpus, path, level, vocab_size, length, limits: see `tasks._language.LanguageTask`. The mask is the last token
            of the vocabulary, behind START.

    Raises:
        ValueError: settings that cannot be; MissingData if the corpus is not here.

    Source: Devlin et al. 2018 (BERT), https://arxiv.org/abs/1810.04805, section 3.1; masks drawn anew: Liu et al. 2019
    (RoBERTa), https://arxiv.org/abs/1907.11692, section 4.1.
    """

    version = 1
    name = "mlm"

    def __init__(
        self,
        *,
        corpus: str,
        level: str,
        length: int,
        path: str | None = None,
        vocab_size: int | None = None,
        limits: Mapping[str, int | None] | None = None,
    ):
        super().__init__(
            corpus=corpus,
            path=path,
            level=level,
            vocab_size=vocab_size,
            length=length,
            limits=limits or {},
            causal=False,
            extra=1,
        )
        self.mask = self.tokenizer.vocab_size
        self.hidden = max(1, round(SHARE * length))
        if self._streams.tokens["test"].size <= length:
            raise ValueError(f"test of {corpus} has fewer tokens than a window, length={length}")

    def segments(self, split: str, seed: int) -> list[Batch]:
        text = whole(self._known(split), self.length)
        if split == "train":
            return [text]
        key = f"{self.name} masks {split} seed={operator.index(seed)}"
        drawn = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little"))
        numbers = torch.from_numpy(drawn.random((3, *text.inputs.shape), dtype=np.float32))
        return [self._hide(text.inputs, numbers)]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch; shuffled, of windows of text with masks of their own; in order, of segments that have masks."""
        if generator is None:
            yield from in_order(segments, batch_size)
            return
        for segment in segments:
            stream, length = segment.inputs.flatten(), self.length
            offset = int(torch.randint(length, (), generator=generator))
            starts = offset + length * torch.randperm((len(stream) - offset) // length, generator=generator)
            places = torch.arange(length, device=stream.device)
            for chosen in starts.to(stream.device).split(batch_size):
                numbers = torch.rand(3, len(chosen), length, generator=generator).to(stream.device)
                hidden = self._hide(stream[chosen[:, None] + places], numbers)
                yield Batch(inputs=hidden.inputs, positions=hidden.positions, targets=hidden.targets).rows(slice(None))

    def _hide(self, tokens: Tensor, numbers: Tensor) -> Batch:
        """Windows [N, L] with hidden tokens, by numbers [3, N, L] in [0, 1): where, how, and with what."""
        tokens = tokens.to(torch.int16 if self.mask < 2**15 else torch.int32)
        positions = numbers[0].topk(self.hidden).indices.sort().values
        targets = tokens.gather(1, positions)
        how = numbers[1].gather(1, positions)
        other = (numbers[2].gather(1, positions) * self.tokenizer.start).to(tokens.dtype)  # START stands in no text
        kind = (how >= MASKED).to(torch.uint8) + (how >= MASKED + RANDOM).to(torch.uint8)
        shown = torch.where(kind == 0, torch.full_like(targets, self.mask), torch.where(kind == 1, other, targets))
        return Batch(
            inputs=tokens.scatter(1, positions, shown),
            positions=positions.to(torch.int16 if self.length < 2**15 else torch.int32),
            targets=targets,
            slices={"class": kind},
        )

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Predictions [N, P, 2] of the hidden tokens."""
        kind = segment.slices["class"]
        groups = [("class", name, kind == i) for i, name in enumerate(KINDS)]
        return self.scores_of(predictions, segment.targets, [(*ALL, torch.ones_like(kind, dtype=torch.bool)), *groups])

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """Count models that see nothing, the token before, and those on both sides as they are shown."""
        (segment,) = splits["test"]
        train = context_of(splits["train"])[:FIT].astype(np.int64)
        shown = np.pad(segment.inputs.numpy().astype(np.int64), ((0, 0), (1, 1)), constant_values=self.mask)
        row = np.arange(len(segment))[:, None]
        place = segment.positions.numpy().astype(np.int64) + 1
        asked = [shown[row, place - 1].ravel(), shown[row, place + 1].ravel()]
        targets = segment.targets.numpy().astype(np.int64).ravel()
        size = float(self.tokenizer.num_bytes[targets].sum()) * np.log(2)
        models = interpolated(([train[:-2], train[2:]], train[1:-1]), (asked, targets), self.mask + 1)
        nats = [float(each.sum()) for each in models]
        return {name: total / size for name, total in zip(("unigram", "left", "left and right"), nats, strict=True)}
