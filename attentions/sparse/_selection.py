"""A sparse mechanism is a selector plus one executor: which keys each query reads, and softmax over them.

selection = Selection(blocks, block_size=16, causal=True)                       the mechanism
heads = sparse_attention(q, k, v, selection)                                    written once
heads, _ = merge([sparse_attention_lse(...), sparse_attention_lse(...)])        over disjoint sets of keys
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Gathering a key costs as much as this many scores of a plain matrix product, forward and backward on a CPU.
GATHER_COST = 16


@dataclass(frozen=True)
class Selection:
    """The keys that queries read: those of the chosen blocks, less what `causal` and `window` take away.

    Block b holds the keys b * block_size ... (b + 1) * block_size - 1; with block_size = 1 single keys are chosen.

    Args:
        blocks: [B or 1, H or G or 1, N, C] int64: row n lists up to C blocks, each at most once; -1 for none.
        block_size: keys per block; the last block may be short.
        query_block: row n is for the queries n * query_block ... (n + 1) * query_block - 1.
        causal: only keys at positions up to the query's own.
        window: only keys less than `window` positions away.
        start: position of the first query; that of the first key is 0.
    """

    blocks: Tensor
    block_size: int
    query_block: int = 1
    causal: bool = False
    window: int | None = None
    start: int = 0


def chosen(mask: Tensor, most: int | None = None) -> Tensor:
    """Blocks for a Selection from a bool mask [N, blocks] or [B or 1, H or G or 1, N, blocks].

    most: the largest number of blocks in a row; None counts them, which on a GPU waits for the mask.
    """
    mask = mask[(None,) * (4 - mask.dim())]
    most = int(mask.sum(-1).max()) if most is None else most
    return largest(torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf), most)


def nearby(length: int, window: int, *, causal: bool, device: torch.device) -> Selection:
    """The `window` latest positions (noncausal: those less than `window` away) of each of `length` positions."""
    size = min(window, length)  # so that a window lies in the own block and its neighbours
    own = torch.arange(-(-length // size), device=device)[:, None]
    blocks = own + torch.arange(-1, 1 if causal else 2, device=device)
    blocks = blocks.masked_fill(blocks == len(own), -1)
    return Selection(blocks[None, None], size, size, causal=causal, window=window)


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores of each row, the first among equals: [..., N] -> [..., min(count, N)] int64.

    -1 stands where the score is -inf.
    """
    values, index = scores.detach().sort(dim=-1, descending=True, stable=True)  # topk breaks ties as it likes
    return index[..., :count].masked_fill(values[..., :count] == -math.inf, -1)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, key_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the chosen keys; a query without a key reads zero.

    The cost is that of the chosen keys, T * C * block_size, unless all scores under a mask are cheaper to have.

    Args:
        q: [B, T, H, K]; k: [B, S, G, K]; v: [B, S, G, V].
        key_mask: [B, S] bool, True where a key may be read.
        dropout: probability of dropping a weight, 0 in eval mode.

    Returns:
        [B, T, H, V], dtype of v.
    """
    return _rows(q, k, v, selection, key_mask).read(dropout)


def sparse_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, key_mask: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `sparse_attention`, with the log-sum-exp of the scores [B, T, H] in at least float32: -inf without a key."""
    rows = _rows(q, k, v, selection, key_mask)
    return rows.read(dropout), rows.queries(masked_logsumexp(rows.scores, rows.visible)[..., None]).squeeze(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over disjoint sets of them; gradients flow through the log-sum-exps.

    Args:
        parts: outputs [B, T, H, V] with their log-sum-exps [B, T, H].
    """
    lse = torch.stack([part for _, part in parts], dim=-1)
    seen = lse > -math.inf
    lse = lse.masked_fill(~seen, 0.0)
    total, weights = masked_logsumexp(lse, seen), masked_softmax(lse, seen)[..., None, :]
    return (torch.stack([part for part, _ in parts], dim=-1) * weights).sum(-1).to(parts[0][0].dtype), total


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """softmax of the visible scores of the last axis, in at least float32; zeros where none is visible."""
    return _lowered(scores, visible).softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)


def masked_logsumexp(scores: Tensor, visible: Tensor) -> Tensor:
    """log-sum-exp of the visible scores of the last axis, in at least float32; -inf where none is visible."""
    return _lowered(scores, visible).logsumexp(-1).masked_fill(~visible.any(-1), -math.inf)


def _lowered(scores: Tensor, visible: Tensor) -> Tensor:
    """Not visible becomes the lowest finite number: the softmax of a row of -inf has NaN in its gradient."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    shown, hidden = (torch.full((), x, dtype=wide, device=scores.device) for x in (0.0, torch.finfo(wide).min))
    return scores + torch.where(visible, shown, hidden)  # an addition: it costs the backward pass nothing


class _Rows(NamedTuple):
    """Rows of queries with the keys that they share.

    scores: [B, G, L, N, E, C, keys], for N rows of C queries and L * E heads in a group, L of them with keys of their
    own; visible: the same or 1 in each axis; values: [B, G, L, N, keys, V] or 1; length: T <= N * C.
    """

    scores: Tensor
    visible: Tensor
    values: Tensor
    length: int

    def read(self, dropout: float) -> Tensor:
        """Values under the softmax of the scores: [B, T, H, V]."""
        weights = _lowered(self.scores, self.visible).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        output = (weights.to(self.values.dtype).flatten(4, 5) @ self.values).unflatten(4, weights.shape[4:6])
        return self.queries(output.masked_fill(~self.visible.any(-1, keepdim=True), 0.0))

    def queries(self, x: Tensor) -> Tensor:
        """[B, G, L, N, E, C, D] -> [B, T, H, D]."""
        return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(3, 5).flatten(1, 2)[:, : self.length]


def _rows(q: Tensor, k: Tensor, v: Tensor, selection: Selection, key_mask: Tensor | None) -> _Rows:
    length, (batch, num_keys, groups, _) = q.shape[1], k.shape
    blocks, size, width = selection.blocks, selection.block_size, selection.query_block
    blocks = blocks.unflatten(1, (-1, 1) if blocks.shape[1] <= groups else (groups, -1))  # [B, G, L, N, C] or 1
    if blocks.shape[-1] * size * (1 + GATHER_COST / width) < num_keys:  # gathered once for `width` queries
        columns = (blocks[..., None] * size + torch.arange(size, device=q.device)).flatten(-2)
        visible = ((columns >= 0) & (columns < num_keys))[..., None, None, :]
        columns = columns.clamp(0, num_keys - 1)
        keys, values = _take(k, columns), _take(v, columns)
        columns = columns[..., None, None, :]
    else:  # all scores, under a mask
        width = length
        columns = torch.arange(num_keys, device=q.device)
        listed = blocks.new_zeros(*blocks.shape[:-1], -(-num_keys // size) + 1, dtype=torch.bool)
        listed = listed.scatter(-1, blocks % listed.shape[-1], True)  # -1 goes to the extra block at the end
        visible = listed[..., :-1].repeat_interleave(size, dim=-1)[..., :num_keys]
        if selection.query_block > 1:
            visible = visible.repeat_interleave(selection.query_block, dim=-2)[..., :length, :]
        visible = visible[:, :, None, None]  # [B, G, 1, 1, E, T, S]
        keys, values = (x.transpose(1, 2)[:, :, None, None] for x in (k, v))

    num_rows = -(-length // width)
    position = selection.start + torch.arange(num_rows * width, device=q.device).view(num_rows, 1, width, 1)
    if selection.causal:
        visible = visible & (columns <= position)
    if selection.window is not None:
        visible = visible & ((columns - position).abs() < selection.window)
    if key_mask is not None:
        visible = visible & key_mask[torch.arange(batch, device=q.device).view(-1, *[1] * 6), columns]

    q = F.pad(q * q.shape[-1] ** -0.5, (0, 0, 0, 0, 0, num_rows * width - length))
    q = q.unflatten(2, (groups, keys.shape[2], -1)).unflatten(1, (num_rows, width)).permute(0, 3, 4, 1, 5, 2, 6)
    scores = (q.flatten(4, 5) @ keys.mT).unflatten(4, q.shape[4:6])
    return _Rows(scores, visible, values, length)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Rows of x [B, S, G, D] at the positions [B or 1, G or 1, ...]: [B, G, ..., D]."""
    batch, num_keys, groups, _ = x.shape
    rest = [1] * (columns.dim() - 2)
    first = torch.arange(batch, device=x.device).view(-1, 1, *rest) * num_keys
    index = (first + columns) * groups + torch.arange(groups, device=x.device).view(1, -1, *rest)
    return F.embedding(index, x.flatten(0, 2))
