"""Induction heads and selective copying, at many lengths: trained on short sequences, asked on longer ones."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from tasks import _mad_laws
from tasks._mqar_data import token_dtype
from tasks._skill_rows import Rows
from tasks._skills import Skill
from tasks.base import IGNORE


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
    least: ClassVar = {"vocab_size": 3, "length": 3}

    @property
    def answers(self) -> tuple[int, int]:
        return 0, self.vocab_size - 1

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
    keys = "length", "num_copies"
    least: ClassVar = {"vocab_size": 4}

    @property
    def answers(self) -> tuple[int, int]:
        return 0, self.vocab_size - 2

    def _check(self, where: str, **setting: Any) -> None:
        _mad_laws.room_to_copy(where, **setting)

    def _draw(self, rng: np.random.Generator, n: int, split: str, **setting: Any) -> Rows:
        return _mad_laws.selective_copying(rng, n, vocab_size=self.vocab_size, **setting)
