"""Language modeling: the next token of a real text, in bits per byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks._batches import in_order
from tasks._count_models import FIT, interpolated, successive
from tasks._language import ALL, LanguageTask, context_of, cut, powers, whole, windows
from tasks._recall_slices import ar_hits, since_last
from tasks.base import Batch, Score

ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}


class LanguageModeling(LanguageTask):
    """Predict every token of a text from those before it in its window.

    A split is one stream, a START token before each document (`tasks/_corpora.py`, `_tokenizers.py`). Training takes
    windows of L tokens that do not overlap, from another offset and in another order every epoch. Valid and test are
    cut once, so every byte of them is scored exactly once: with as much context as its place in the window gives.
    Test is cut again for each of `eval_lengths`, shorter or longer than trained: the same bytes, scored as slice
    "length" and nowhere else. Backbones with learned positions know none beyond L; take rotary or none.

    Scores are bits per byte (nats / ln 2 / bytes of the text), comparable between levels; nats and perplexity per
    token; accuracy. Test is sliced by `position` in the window, by `since` (distance back to the last n-gram
    equal to the one that ends in the target), and by `recall`: "hit" if there is such an n-gram and train has it at
    most `rare` times (Zoology's AR hits), "other" else.

    Args:
        corpus, path, level, vocab_size, length, limits: see `tasks._language.LanguageTask`.
        eval_lengths: further windows that test is cut into.
        ngram: tokens of the n-grams of `since` and `recall`, 2 or more; Zoology: 2, of words and parts of words.
        rare: see above; Zoology: 1250, in 10 billion tokens.

    Raises:
        ValueError: settings that cannot be, in one line with the way out; MissingData if the corpus is not here.

    Source: bits per character and the split of enwik8: Graves 2013, https://arxiv.org/abs/1308.0850, section 3;
    AR hits: Arora et al. 2023, https://arxiv.org/abs/2312.04927, section 3; evaluation lengths: Zhang et al. 2022
    (CAB), https://arxiv.org/abs/2210.07661, the experiment on interpolation and extrapolation.
    Differs: no sliding evaluation, so published numbers with longer contexts are lower.
    """

    version = 1
    name = "lm"
    seeded = False

    def __init__(
        self,
        *,
        corpus: str,
        level: str,
        length: int,
        path: str | None = None,
        vocab_size: int | None = None,
        eval_lengths: Sequence[int] = (),
        ngram: int = 2,
        rare: int = 1250,
        limits: Mapping[str, int | None] | None = None,
    ):
        if ngram < 2 or rare < 0:
            raise ValueError(f"ngram must be at least 2 and rare at least 0, got ngram={ngram} and rare={rare}")
        self.eval_lengths = sorted({int(given) for given in eval_lengths} - {length})
        if self.eval_lengths and self.eval_lengths[0] < 1:
            raise ValueError(f"eval_lengths must be 1 or more, got {list(eval_lengths)}")
        super().__init__(
            corpus=corpus,
            path=path,
            level=level,
            vocab_size=vocab_size,
            length=length,
            limits=limits or {},
            causal=True,
            longest=max(length, *self.eval_lengths, 0),
        )
        self.ngram, self.rare = ngram, rare

    def segments(self, split: str, seed: int) -> list[Batch]:
        tokens = self._known(split)
        if split == "train":
            return [whole(tokens, self.length)]
        main = cut(tokens, self.length, self.tokenizer.start)
        if split == "valid":
            return [main]
        inputs, targets = main.inputs.numpy(), main.targets.numpy()
        since = since_last(inputs, targets, self.ngram)
        hits = ar_hits(inputs, targets, self._known("train"), self.ngram, self.rare, since)
        rest = [cut(tokens, length, self.tokenizer.start) for length in self.eval_lengths]
        return [windows(inputs, targets, since=since, recall=hits), *rest]

    def unrepeated(self, segments: Sequence[Batch]) -> Sequence[Batch]:
        return segments[:1]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch; shuffled, the windows begin at an offset below L, and the first or last tokens are left out."""
        if generator is None:
            yield from in_order(segments, batch_size)
            return
        for segment in segments:
            stream, length = segment.inputs.flatten(), segment.inputs.shape[1]
            offset = int(torch.randint(length, (), generator=generator))
            starts = offset + length * torch.randperm((len(stream) - 1 - offset) // length, generator=generator)
            places = torch.arange(length + 1, device=stream.device)
            for chosen in starts.to(stream.device).split(batch_size):
                tokens = stream[chosen[:, None] + places].long()
                yield Batch(
                    inputs=tokens[:, :-1], positions=places[:-1].expand(len(tokens), length), targets=tokens[:, 1:]
                )

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Predictions [N, L, 2]; windows of another length than trained count for their `length` only."""
        every = torch.ones_like(segment.targets, dtype=torch.bool)
        length = segment.targets.shape[1]
        groups: list[tuple[str, str, Tensor]] = [("length", str(length), every)]
        if length == self.length:
            groups += [(*ALL, every), *self._slices(segment)]
        return self.scores_of(predictions, segment.targets, groups)

    def _slices(self, segment: Batch) -> Iterator[tuple[str, str, Tensor]]:
        if not segment.slices:
            return
        yield ("position", "0", segment.positions == 0)
        yield from (("position", label, places) for label, places in powers(segment.positions))
        yield from (("since", label, places) for label, places in powers(segment.slices["since"]))
        hits = segment.slices["recall"].bool()
        yield from (("recall", "hit", hits), ("recall", "other", ~hits))

    def derived(self, scores: Mapping[tuple[str, tuple[str, str]], Score]) -> Iterable[Score]:
        """Perplexity; and the loss over all, which is that of the windows of length L and not of all segments."""
        main = scores["loss", ("length", str(self.length))]
        loss = Score(metric="loss", value=main.value, count=main.count)
        yield loss
        yield from super().derived({**scores, ("loss", ALL): loss})

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """Count models with no token of context, one and two (they read across windows), and xz on test by itself."""
        order = max(ORDERS.values())
        train = successive(context_of(splits["train"])[:FIT], order)
        test = successive(context_of(splits["test"]), order)
        size = float(self.tokenizer.num_bytes[test[1]].sum()) * np.log(2)
        nats = [float(each.sum()) for each in interpolated(train, test, self.tokenizer.vocab_size)]
        return {name: nats[n - 1] / size for name, n in ORDERS.items()} | {"xz": self.compressed()}
