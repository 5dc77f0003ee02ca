"""Faults of who reads whom: the future seen, the past or the context not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, repeat_heads
from attentions.dense.softmax import Softmax
from attentions.local.sliding_window import SlidingWindow
from faulty.registry import caught


@caught("no_look_ahead", r"T=37, inputs after 0 replaced: an output up to 0: differs by .* first at row 0, position 0")
class RowMean(Softmax):
    """Adds the mean over the whole row."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        mean = repeat_heads(v, q.shape[2]).mean((1, 3), keepdim=True)
        return super().attend(q, k, v, **keywords) + mean


@caught("no_look_ahead", "inputs after 0 replaced: an output up to 0")
class OffByOneMask(Softmax):
    """Position t reads t + 1."""

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(diagonal=1)


@caught("no_look_ahead", "inputs after 0 replaced", window=4)
class NoncausalWindow(SlidingWindow):
    """A window built without causality inside a causal layer (Zoology's NSA)."""

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return (torch.arange(num_queries)[:, None] - torch.arange(num_keys)).abs() < self.window


@caught("no_look_ahead", "declared to look ahead, yet no output does: it ranks all keys")
class NeedlessConfession(Softmax):
    """Strictly causal, and declared not to be: it would be kept out of the ranking for nothing."""

    leaks = "it ranks all keys"


@caught("grid", "inputs after 5 replaced: an output up to 5")
class ColumnByColumn(Softmax):
    """Orders the positions of an image by columns, where an image is read by rows."""

    patterns = Pattern.SELF

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        if self.spec.grid is None or not self.spec.causal:
            return None
        order = torch.arange(num_keys).view(self.spec.grid).mT.flatten().argsort()
        return order[:, None] >= order


@caught("no_look_ahead", "train mode")
class TimeBatchNorm(Softmax):
    """Batch norm over batch and time: statistics of the future, in train mode only."""

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, dropout=dropout, bias=bias)
        self.norm = nn.BatchNorm1d(spec.dim)

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.norm(super().merge(x, heads).mT).mT


@caught("no_look_ahead", "inputs after")
class RankedKeys(Softmax):
    """Reads the keys of the past that are among the largest of the row: a leak without a gradient."""

    patterns = Pattern.CAUSAL_SELF

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        size = k.square().sum((2, 3))
        largest = torch.zeros_like(size).scatter(1, size.topk(max(1, k.shape[1] // 2)).indices, 1.0).bool()
        visible = largest[:, None, None, :] & torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        return self._sdpa(q, k, v, visible | torch.eye(k.shape[1], dtype=torch.bool), False)


@caught("no_look_ahead", "inputs after")
class GlobalStabiliser(QKVAttention):
    """FAVOR+ features stabilised by the maximum over all keys, not cancelled because of an eps (CAB's Performer)."""

    patterns = Pattern.CAUSAL_SELF
    paper = "https://arxiv.org/abs/2009.14794"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        q, k = ((x - x.amax((1, 3), keepdim=True)).exp() + 1e-4 for x in (q, repeat_heads(k, q.shape[2])))
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
        return torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), repeat_heads(v, q.shape[2]))


@caught("no_look_ahead", "cut off")
class LengthLeak(Softmax):
    """Scores scaled by the length of the row: no content leaks, but no decoder knows it (cosFormer's M)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q * q.shape[1] / 37, k, v, **keywords)


@caught("no_look_ahead", "T=131, inputs after 64 replaced: an output up to 64: differs by .* position 64")
class LeakyChunk(Softmax):
    """From position 64 on, a chunk sees all of itself: right for every row of one chunk."""

    patterns = Pattern.CAUSAL_SELF

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        chunk = torch.arange(num_keys) // 64
        same = (chunk[:num_queries, None] == chunk) & (chunk > 0)
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril() | same


@caught("no_look_ahead", "T=11, inputs after 0 replaced", fewer=True)
@caught("no_look_ahead", "T=37, inputs after 0 replaced", fewer=False)
class MixedQueries(Softmax):
    """Causal cross-attention whose queries are averaged with the next, where they are fewer (more) than the keys."""

    patterns = Pattern.CAUSAL_CROSS

    def __init__(self, spec: LayerSpec, *, fewer: bool):
        super().__init__(spec)
        self.fewer = fewer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        applies = self.fewer == (q.shape[1] < k.shape[1])
        return super().attend((q + q.roll(-1, dims=1)) / 2 if applies else q, k, v, **keywords)


@caught("mixing", "outputs ignore the values of all earlier inputs")
class UnsummedMemory(QKVAttention):
    """CAB's causal ABC: a slot holds exp(a_t - lse_{i<=t} a_i) k_t, not its sum over i <= t; the past only weighs."""

    patterns = Pattern.CAUSAL_SELF
    paper = "https://arxiv.org/abs/2110.02488"

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.slots = nn.Linear(self.key_dim, 5, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        logits = self.slots(k)
        share = (logits - logits.logcumsumexp(1))[..., None].exp()
        keys, values = share * k[..., None, :], share * v[..., None, :]  # both lack .cumsum(1)
        weights = torch.einsum("bthk,bthck->bthc", q, keys).softmax(-1)
        return torch.einsum("bthc,bthcv->bthv", weights, values)


@caught("mixing", "outputs ignore all later inputs")
class SecretlyCausal(Softmax):
    """Declares noncausal and computes causal (S4D without its second direction)."""

    patterns = Pattern.NONCAUSAL_SELF

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril()


@caught("mixing", "outputs ignore all earlier context")
class IgnoredContext(Softmax):
    """Cross-attention that attends to its own queries."""

    patterns = Pattern.CROSS

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, x)


@caught("mixing", 'declared as paper = "control", but earlier inputs matter')
class MixingControl(Softmax):
    """Says that it mixes nothing."""

    paper = "control"
