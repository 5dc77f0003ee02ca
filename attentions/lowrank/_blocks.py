"""What mechanisms over blocks share: cutting a sequence into them, and a softmax that holds masks exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def segments(x: Tensor, size: int) -> Tensor:
    """Blocks of `size` positions, zeros (False) behind the end: [..., T, D] -> [..., N, size, D]."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def tiles(x: Tensor, size: int, before: int, after: int) -> Tensor:
    """The same blocks with their neighbours on both sides: [..., T, D] -> [..., N, D, before + size + after]."""
    fill = -x.shape[-2] % size
    return F.pad(x, (0, 0, before, after + fill)).unfold(-2, before + size + after, size)


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the last axis where seen (bool, broadcast); zero elsewhere, and where nothing is seen."""
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~seen, 0.0)


def pooled(
    k: Tensor, v: Tensor, logits: Tensor, size: int, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each complete block of `size` positions as R weighted means, weights softmax(logits) over its seen positions.

    Args:
        k, v: [B, S, G, D]; logits: [B, S, G, R]; key_mask: [B, S].

    Returns:
        Keys and values [B, N R, G, D], and which means are of any position [B, N R]; the others are zero.
    """
    count = k.shape[1] // size
    k, v, logits = (x[:, : count * size].reshape(len(x), count, size, *x.shape[2:]) for x in (k, v, logits))
    hidden = k.new_zeros(k.shape[:3], dtype=torch.bool)
    if key_mask is not None:
        hidden = ~key_mask[:, : count * size].reshape(hidden.shape)
    weights = masked_softmax(logits.movedim(2, -1), ~hidden[:, :, None, None])  # [B, N, G, R, size]
    k, v = (x.masked_fill(hidden[..., None, None], 0.0).transpose(2, 3) for x in (k, v))
    k, v = ((weights @ x).transpose(2, 3).flatten(1, 2) for x in (k, v))
    return k, v, (~hidden).any(-1).repeat_interleave(logits.shape[-1], dim=1)
