"""The layer's own dense attention as a target: what a learned selector is trained to foresee."""

from __future__ import annotations

import torch
from torch import Tensor

from attentions.base import repeat_heads
from attentions.sparse._selection import masked_softmax


def visible_keys(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    key_mask: Tensor | None,
    device: torch.device,
    start: int = 0,
) -> Tensor:
    """Which keys the queries from position `start` on may read: [B or 1, 1, T, S] bool."""
    visible = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
    visible = visible.tril(start) if causal else visible
    return visible if key_mask is None else visible & key_mask[:, None, None]


@torch.no_grad()
def dense_weights(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) over the visible keys [B, H, T, S], at least float32, through which no gradient flows.

    Args:
        q: [B, T, H, K]; k: [B, S, G, K].
        visible: [B or 1, 1, T, S] bool; a query without a key has zeros.
    """
    with torch.autocast(q.device.type, enabled=False):
        keys = repeat_heads(k, q.shape[2]).permute(0, 2, 3, 1)
        return masked_softmax((q.transpose(1, 2) * q.shape[-1] ** -0.5) @ keys, visible)
