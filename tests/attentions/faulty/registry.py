"""The list of planted faults.

`@caught("check", "words of the error")` says which check of the contract must find a fault, and what it must say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attentions.base import Attention


@dataclass(frozen=True)
class Fault:
    name: str
    factory: Callable[..., Attention]
    check: str
    saying: str
    config: dict[str, Any] | None


FAULTS: list[Fault] = []


def caught(check: str, saying: str, config: dict[str, Any] | None = None, **keywords: Any) -> Callable[[Any], Any]:
    """Enter a class in the list; keywords are its hyper-parameters."""

    def enter(cls: Any) -> Any:
        FAULTS.append(Fault(cls.__name__, functools.partial(cls, **keywords), check, saying, config))
        return cls

    return enter
