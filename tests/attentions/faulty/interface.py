"""Faults of YAML, patterns, shapes, seeds, state dict and dropout."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern
from attentions.dense.softmax import Softmax
from attentions.local.sliding_window import SlidingWindow
from faulty.registry import caught


def target(name: str, **keys: Any) -> dict[str, Any]:
    """A YAML row that names a class of this file."""
    return {"_target_": f"{__name__}.{name}", "_partial_": True, **keys}


@caught("yaml_keys", "has no keyword widnow", target("StaleKey", window=4, widnow=4), window=4)
class StaleKey(SlidingWindow):
    """Its row misspells a keyword."""

    def __init__(self, spec: LayerSpec, *, window: int):
        super().__init__(spec, window=window)


@caught("yaml_keys", "its YAML hides: bias, dropout", target("HiddenKeys", window=4), window=4)
class HiddenKeys(SlidingWindow):
    """Its row leaves out two of three keywords."""


@caught("yaml_keys", "takes \\*args or \\*\\*kwargs", target("AnyKeyword"))
class AnyKeyword(Softmax):
    """Its constructor swallows whatever a row says."""

    def __init__(self, spec: LayerSpec, **kwargs: Any):
        super().__init__(spec, **kwargs)


@caught("yaml_keys", "defines no", target("Missing"))
class MissingTarget(Softmax):
    """Its row names a class that is not there."""


@caught("patterns", "noncausal self is not declared, yet not refused")
class NeverRefuses(Softmax):
    """Takes any slot and computes what it can."""

    patterns = Pattern.CAUSAL_SELF

    def __init__(self, spec: LayerSpec):
        super().__init__(dataclasses.replace(spec, causal=True, cross=False))


@caught("patterns", r"became \[2, 37, 36\] torch.float32")
class AlwaysFloat32(Softmax):
    """The output has a dtype of its own."""

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().merge(x, heads).float()


@caught("shapes", "B=1, T=1, .*: output: not finite")
class Standardised(Softmax):
    """Standardised over positions: 0 / 0 for one position."""

    patterns = Pattern.NONCAUSAL_SELF

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        centred = heads - heads.mean(1, keepdim=True)
        return super().merge(x, centred / centred.square().mean(1, keepdim=True).sqrt())


@caught("same_seed", "a second forward in eval mode")
class RedrawnFeatures(Softmax):
    """Draws its random projection anew in every forward, also in evaluation (Zoology's BigBird blocks)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k @ torch.randn(self.key_dim, self.key_dim).to(k), v, **keywords)


@caught("same_seed", "two constructions under one seed differ in shift")
class OwnGenerator(Softmax):
    """Draws its start from a generator that nobody seeds."""

    generator = torch.Generator().manual_seed(0)

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.shift = nn.Parameter(torch.randn(spec.dim, generator=self.generator))

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().merge(x, heads) + self.shift


@caught("state_dict", "loaded from another's state dict")
class HiddenProjection(Softmax):
    """A random matrix that the state dict lacks (CAB's Performer)."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.projection = torch.randn(self.key_dim, self.key_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k @ self.projection.to(k), v, **keywords)


@caught("dropout", "changes nothing in train mode")
class SilentDropout(Softmax):
    """Takes a dropout and ignores it (six of CAB's mechanisms)."""

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0):
        super().__init__(spec)


@caught("dropout", "eval mode with dropout=0.5")
class EndlessDropout(Softmax):
    """Drops in evaluation as well."""

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().merge(x, F.dropout(heads, self.dropout))
