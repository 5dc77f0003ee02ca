"""Induction heads and selective copying, at many lengths: trained on short sequences, asked on longer ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks import _mad_laws
from tasks._mqar_data import token_dtype
from tasks._mqar_segments import whole
from tasks._skills import ACCURACY, Rows, Skill, read_settings
from tasks.base import IGNORE, SPLITS, PerToken, TaskSpec, Tokens


class Induction(Skill):
    """A special token stands somewhere among random ones and again at the end: what followed it is due once more.

        input   4 1 7 S 2 9 4 1 ... 6 S          label at the last position: 2

    The first special token stands at a uniform place with an answer behind it. Test lengths beyond the trained ones ask
    whether what was learned is a rule.

    Args:
        vocab_size: V; tokens 0 .. V - 2, the special one is V - 1.
        train, valid, test: segments {length, num_examples}; length >= 3.
        repeats: how often the whole input is read; the label stands in the last reading.

    Source: Gu and Dao 2023 (Mamba), https://arxiv.org/abs/2312.00752, section 4.1.2 (V = 16, trained at 256, asked up
    to 2^20); Olsson et al. 2022, https://arxiv.org/abs/2209.11895.
    """

    version = 1
    name = "induction"
    protocol = "clean"

    def __init__(
        self,
        *,
        vocab_size: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        repeats: int = 1,
    ):
        whole("vocab_size", vocab_size, 3)
        whole("repeats", repeats, 1)
        self.vocab_size, self.repeats, self.answers = vocab_size, repeats, (0, vocab_size - 1)
        splits = dict(zip(SPLITS, (train, valid, test), strict=True))
        self._settings = read_settings(splits, ("length",), {"length": 3})
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=vocab_size),
            output=PerToken(num_classes=vocab_size),
            length=repeats * max(s["length"] for settings in self._settings.values() for s in settings),
            causal=True,
            metrics=ACCURACY,
            primary="accuracy",
            chance=1 / (vocab_size - 1),
        )

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        length, row = setting["length"], np.arange(n)
        dtype = token_dtype(self.vocab_size, self.spec.length)
        inputs = rng.integers(self.vocab_size - 1, size=(n, length), dtype=dtype)
        place = rng.integers(length - 2, size=n)
        inputs[row, place] = inputs[:, -1] = self.vocab_size - 1
        labels, distance = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        labels[:, -1] = inputs[row, place + 1]
        distance[:, -1] = length - 1 - place
        return {"inputs": inputs, "labels": labels, "distance": distance}


class SelectiveCopying(Skill):
    """Tokens among blanks, then a copy token and as many blanks, at which the tokens are due in order.

        input   . 4 . . 7 1 . . C . . .          label at the last three: 4 7 1

    Blanks stand at drawn places, so the answer is not a fixed distance away, and no answer is fed back.

    Args:
        vocab_size: V; tokens 0 .. V - 3, the blank V - 2, the copy token V - 1.
        train, valid, test: segments {length, num_copies, num_examples}; length > 2 * num_copies + 1.
        repeats: how often the whole input is read; labels stand in the last reading.

    Source: Gu and Dao 2023 (Mamba), https://arxiv.org/abs/2312.00752, section 4.1.1 (16 tokens in 4096 positions, V =
    16); Jing et al. 2019, https://arxiv.org/abs/1706.02761, for the denoise task it comes from. Sizes not confirmed
    from the paper's text.
    """

    version = 1
    name = "selective_copying"
    protocol = "clean"

    def __init__(
        self,
        *,
        vocab_size: int,
        train: Sequence[Mapping[str, int]],
        valid: Sequence[Mapping[str, int]],
        test: Sequence[Mapping[str, int]],
        repeats: int = 1,
    ):
        whole("vocab_size", vocab_size, 4)
        whole("repeats", repeats, 1)
        self.vocab_size, self.repeats, self.answers = vocab_size, repeats, (0, vocab_size - 2)
        splits = dict(zip(SPLITS, (train, valid, test), strict=True))
        self._settings = read_settings(splits, ("length", "num_copies"))
        for split, settings in self._settings.items():
            for i, s in enumerate(settings):
                if s["length"] <= 2 * s["num_copies"] + 1:
                    raise ValueError(
                        f"{split}[{i}].length must be above 2 * num_copies + 1, got length={s['length']} and "
                        f"num_copies={s['num_copies']}; nearest: length={2 * s['num_copies'] + 2}"
                    )
        self.spec = TaskSpec(
            inputs=Tokens(vocab_size=vocab_size),
            output=PerToken(num_classes=vocab_size),
            length=repeats * max(s["length"] for settings in self._settings.values() for s in settings),
            causal=True,
            metrics=ACCURACY,
            primary="accuracy",
            chance=1 / (vocab_size - 2),
        )

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        return _mad_laws.selective_copying(rng, n, vocab_size=self.vocab_size, **setting)
