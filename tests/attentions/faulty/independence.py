"""Faults that let masked inputs, rows of the batch or heads meet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import Pattern, repeat_heads
from attentions.dense.softmax import Softmax
from faulty.registry import caught


@caught("key_mask", "inputs masked left replaced: differs")
class IgnoredMask(Softmax):
    """Padding is read like anything else."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return super().attend(q, k, v)


@caught("key_mask", "gradient of .*: not finite")
class EmptyRows(Softmax):
    """The softmax of a row of -inf, patched after the fact: its gradient is NaN."""

    patterns = Pattern.CAUSAL_SELF

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        scores = torch.einsum("bthk,bshk->bhts", q, k) / self.key_dim**0.5
        if is_causal:
            visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        if visible is not None:
            scores = scores + torch.zeros_like(scores).masked_fill(~visible, -torch.inf)
        return torch.einsum("bhts,bshv->bthv", scores.softmax(-1).nan_to_num(), v)


@caught("key_mask", "a mask of all ones against none")
class BiasedMask(Softmax):
    """A mask is added to the values, ones included."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return super().attend(q, k, v if key_mask is None else v + key_mask[..., None, None], key_mask=key_mask)


@caught("batch_rows", "other rows replaced: row 0")
class MixedBatch(Softmax):
    """Values are centred over the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k, v - v.mean(0, keepdim=True), **keywords)


@caught("batch_rows", "rows in another order")
class NumberedRows(Softmax):
    """Treats a row by its place in the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k, v, **keywords) * torch.arange(1, len(q) + 1).to(q)[:, None, None, None]


@caught("batch_rows", "a row on its own")
class DividedByBatch(Softmax):
    """Scales by the size of the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k, v, **keywords) / len(q)


@caught("heads", "H=3, G=3: other weights for head 0 of k_proj and v_proj change heads .* instead of \\[0\\]")
class SwappedHeadAxis(Softmax):
    """Heads split off by `view` where a transpose was due; shapes agree."""

    patterns = Pattern.NONCAUSAL_SELF

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        q, k, v = (x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).reshape(q.shape[0], q.shape[2], q.shape[1], -1)


@caught("heads", "H=6, G=2")
class WrongGroups(Softmax):
    """Query head h reads key-value head h mod G."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        times = q.shape[2] // k.shape[2]
        return super().attend(q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1), **keywords)


@caught("heads", "merge moves position 18 to others")
class SwappedMerge(Softmax):
    """The heads are joined with time as the inner axis."""

    patterns = Pattern.NONCAUSAL_SELF

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[1], -1))
