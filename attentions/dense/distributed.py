"""Softmax attention over several processes of torch.distributed, equal to the dense one in values and gradients.

Two ways, for process groups of any backend (gloo on CPUs, NCCL on GPUs), every process calling the same function:

* `head_parallel`: every rank has all positions and some heads; the partial outputs are summed.
* `sequence_parallel`: every rank has all heads and some positions; the softmax over all keys is put together from the
  ranks' maxima, normalisers and sums.

Gradients flow through the communication, once: no double backward. Not a row of a leaderboard, which runs in one
process.

Source: He and Kabic 2023, https://arxiv.org/abs/2302.06218, whose abstract has a distributed multi-head attention; its
schedule is not confirmed from the paper's text, so both are the textbook forms: heads as in Shoeybi et al. 2019
(Megatron-LM), https://arxiv.org/abs/1909.08053, section 3; keys as in the merge of partial softmaxes of Milakov and
Gimelshein 2018, https://arxiv.org/abs/1805.02867. Differs from ring attention: queries are gathered, keys stay.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from attentions.base import repeat_heads
from attentions.dense.softmax import Softmax
from attentions.linear._recurrence import wide

Group = Any  # dist.ProcessGroup, or None for all processes


def head_parallel(
    layer: Softmax,
    x: Tensor,
    context: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """`layer(x, context)` with rank r computing key-value heads r G / R to (r + 1) G / R and their query heads.

    Inputs, and the loss that is made of the output, are the same on every rank. The gradients of x and context are
    then complete on every rank; those of the projections are zero outside of a rank's own rows and columns, and their
    sum over ranks is that of one process. A rank reads only its part of the projections, so they may be cut.

    Args:
        layer: softmax attention, with equal parameters on every rank and no dropout.
        x, context, key_mask: [B, T, M], [B, S, M] and [B, S], as in `layer.forward`.
        group: R processes, R a divisor of the layer's key-value heads.

    Returns:
        [B, T, M], on every rank.

    Raises:
        ValueError: R does not divide the key-value heads.
    """
    spec, (rank, size) = layer.spec, _place(group)
    if spec.kv_heads % size:
        raise ValueError(f"processes must divide the key-value heads, got {size} processes and {spec.kv_heads} heads")
    shared = _Copy.apply(x, group)
    source = shared if context is None else _Copy.apply(context, group)

    def own(projection: torch.nn.Linear, inputs: Tensor, heads: int) -> Tensor:
        rows = slice(rank * (count := projection.out_features // size), (rank + 1) * count)
        output = F.linear(inputs, projection.weight[rows], None if projection.bias is None else projection.bias[rows])
        return output.unflatten(-1, (heads // size, -1))

    q = layer._rotate(own(layer.q_proj, shared, spec.num_heads), 0)
    k = layer._rotate(own(layer.k_proj, source, spec.kv_heads), 0)
    heads = layer.attend(q, k, own(layer.v_proj, source, spec.kv_heads), key_mask=key_mask).flatten(2)
    columns = slice(rank * heads.shape[-1], (rank + 1) * heads.shape[-1])
    bias = None if layer.out_proj.bias is None else layer.out_proj.bias * (rank == 0)  # once in the sum
    return _Reduce.apply(F.linear(heads, layer.out_proj.weight[:, columns], bias), group)


def sequence_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for sequences whose consecutive pieces lie on consecutive ranks, none of them empty.

    Queries are gathered; every rank reads its own keys with all of them (causal: with those at or after its first key),
    and the ranks' results are merged: with m the largest score over all ranks, numerators and normalisers are scaled by
    exp(m_r - m) and summed. Keys and values never move, so a rank holds S / R of them. The maximum is held constant in
    the backward pass, which is exact, as it cancels.

    With a loss that is the sum of the ranks' own, each made of its own piece of the output, the gradients of q, k and v
    are complete on their rank; parameters before and after are as in data parallelism: to be summed over ranks.

    Args:
        q: [B, T_r, H, K]; k: [B, S_r, G, K]; v: [B, S_r, G, V]; key_mask: [B, S_r]. Causal: T_r = S_r.

    Returns:
        [B, T_r, H, V], zero for a query that sees no key.
    """
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention needs a key per query on each rank, got {k.shape[1]} and {q.shape[1]}")
    rank, size = _place(group)
    lengths = torch.zeros(size, dtype=torch.long, device=q.device)
    lengths[rank] = q.shape[1]
    dist.all_reduce(lengths, group=group)
    start, total = int(lengths[:rank].sum()), int(lengths.sum())
    place = (start, start + q.shape[1], total, group)

    first = start if causal else 0  # earlier queries see none of these keys
    queries = wide(_Gather.apply(q, *place))[:, first:]
    k, v = (wide(repeat_heads(part, q.shape[2])) for part in (k, v))
    scores = torch.einsum("bthc,bshc->bths", queries, k) / math.sqrt(q.shape[-1])
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen &= torch.ones(scores.shape[1], scores.shape[3], dtype=torch.bool, device=q.device).tril()[:, None]
    if key_mask is not None:
        seen &= key_mask[:, None, None]
    least = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~seen, least)

    earlier = (0, 0, 0, 0, first, 0)
    largest = F.pad(scores.detach().amax(-1, keepdim=True), earlier, value=least)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    weights = (scores - largest[:, first:]).exp().masked_fill(~seen, 0.0)
    parts = torch.cat([torch.einsum("bths,bshv->bthv", weights, v), weights.sum(-1, keepdim=True)], dim=-1)
    merged = _SumScatter.apply(F.pad(parts, earlier), *place)
    return (merged[..., :-1] / merged[..., -1:].clamp_min(torch.finfo(merged.dtype).tiny)).to(q.dtype)


def _place(group: Group) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def _summed(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _gathered(x: Tensor, start: int, stop: int, total: int, group: Group) -> Tensor:
    """Pieces [B, T_r, ...] of all ranks -> [B, T, ...]; as a sum, so that pieces may differ in length."""
    whole = x.new_zeros(x.shape[0], total, *x.shape[2:])
    whole[:, start:stop] = x
    dist.all_reduce(whole, group=group)
    return whole


class _Copy(torch.autograd.Function):
    """The identity; backward: the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(gradients[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    """The sum over ranks; backward: the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    """Pieces of a sequence to the whole; backward: the sum over ranks, of which each takes its piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, stop: int, total: int, group: Group) -> Tensor:
        ctx.place = (start, stop, total, group)
        return _gathered(x, *ctx.place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        start, stop, _, group = ctx.place
        return _summed(gradients[0], group)[:, start:stop], None, None, None, None


class _SumScatter(torch.autograd.Function):
    """The sum over ranks, of which each takes its piece; backward: pieces to the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, stop: int, total: int, group: Group) -> Tensor:
        ctx.place = (start, stop, total, group)
        return _summed(x, group)[:, start:stop].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(gradients[0], *ctx.place), None, None, None, None
