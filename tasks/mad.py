"""MAD: six skills of a sequence mixer, each at a baseline and at changes of one factor that make it harder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks import _mad_laws
from tasks._mad import MAD
from tasks.base import Reconstruction


class InContextRecall(MAD):
    """Pairs `key value` under a mapping that each sequence makes up; every value of a key seen before is due."""

    version = 1
    name = "mad_recall"
    law = staticmethod(_mad_laws.recall)
    next_token = True

    @property
    def answers(self) -> tuple[int, int]:
        clear = self.vocab_size - self._law.get("noise_vocab_size", 0)
        return clear // 2, clear

    def _length(self, **law: Any) -> int:
        return law["length"] - 1


class NoisyRecall(InContextRecall):
    """In-context recall where a pair is two tokens of noise with probability `noise_share`."""

    version = 1
    name = "mad_noisy_recall"

    def __init__(self, *, noise_vocab_size: int, noise_share: float, **base: Any):
        self.own = {"noise_vocab_size": noise_vocab_size, "noise_share": noise_share}
        super().__init__(**base)

    def _check(self, where: str, **law: Any) -> None:
        super()._check(where, **law)
        if not 0 <= law["noise_share"] < 1:
            raise ValueError(f"noise_share must lie in [0, 1), got {law['noise_share']}; published: 0.2")
        if law["noise_vocab_size"] > law["vocab_size"] - 4 or (law["noise_share"] and not law["noise_vocab_size"]):
            raise ValueError(
                f"noise_vocab_size must leave four tokens of vocab_size={law['vocab_size']} and be at least 1 where "
                f"there is noise, got {law['noise_vocab_size']}; published: 16 of 32"
            )


class FuzzyRecall(MAD):
    """In-context recall whose keys and values are 1 to `max_motif` tokens long."""

    version = 1
    name = "mad_fuzzy_recall"
    law = staticmethod(_mad_laws.fuzzy_recall)
    next_token = True

    def __init__(self, *, max_motif: int, **base: Any):
        self.own = {"max_motif": max_motif}
        super().__init__(**base)

    @property
    def answers(self) -> tuple[int, int]:
        return (self.vocab_size - 1) // 2, self.vocab_size - 1

    def _check(self, where: str, **law: Any) -> None:
        keys, motif = self.answers[0], law["max_motif"]
        if motif > keys or (keys + 1) ** motif >= 2**62:
            raise ValueError(f"max_motif must be at most the {keys} keys of the vocabulary, got {motif}; published: 3")
        if law["length"] < 6 * motif:
            raise ValueError(f"length must be at least 6 * max_motif = {6 * motif}, got {law['length']}")


class Memorization(MAD):
    """`key insert`: a key has one value in all sequences, never shown, so that weights must hold it."""

    version = 1
    name = "mad_memorization"
    law = staticmethod(_mad_laws.memorization)

    @property
    def choices(self) -> int:
        return (self.vocab_size - 1) // 2

    def _seeded(self, setting: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        rng = self._generator("mapping", f"seed={seed}")
        return {**setting, "mapping": _mad_laws.fixed_mapping(rng, self.vocab_size)}


class Compression(MAD):
    """Random tokens, to be rebuilt all of them from the last position's state."""

    version = 1
    name = "mad_compression"
    law = staticmethod(_mad_laws.compression)
    answer_kind = Reconstruction

    @property
    def choices(self) -> int:
        return self.vocab_size - 1

    def _check(self, where: str, **law: Any) -> None:
        """Every length has data."""


class SelectiveCopying(MAD):
    """Tokens among blanks, to be copied in order at the end; no answer is fed back."""

    version = 1
    name = "mad_selective_copying"
    law = staticmethod(_mad_laws.selective_copying)

    def __init__(self, *, num_copies: int, **base: Any):
        self.own = {"num_copies": num_copies}
        super().__init__(**base)

    @property
    def answers(self) -> tuple[int, int]:
        return 0, self.vocab_size - 2

    def _check(self, where: str, **law: Any) -> None:
        _mad_laws.room_to_copy(where, **law)
