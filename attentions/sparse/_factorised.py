"""Attention factorised into a step to what is near and a step far away, each a set of positions known beforehand."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, QKVAttention, State, repeat_heads
from attentions.sparse._selection import masked_softmax

COMBINE = ("merged", "heads", "layers")
Part = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]  # scores [B, H, N, l, X], positions of keys, values by weights


@dataclass(kw_only=True)
class Kept(State):
    """Keys [B, n, G, K] and values [B, n, G, V] at the positions `held`."""

    k: Tensor
    v: Tensor


class Factorised(QKVAttention):
    """Two sets of positions, A1 near and A2 far, such that two steps lead from every position to every other.

    Noncausal: the same sets without the restriction to the past. A query without a key reads zero.

    Args:
        stride: l, about sqrt(T) in the paper.
        combine: "merged": each head reads A1 and A2 in one softmax; "heads": heads read A1, A2, A1, ...; "layers":
            layers do. The paper's three ways, section 5.1; its text model is merged.
        dropout: probability of dropping an attention weight in training; bias: bias on the projections.

    Source: Child et al. 2019, https://arxiv.org/abs/1904.10509, section 4.3. Differs: the noncausal form is
    ours; every pattern of the paper is causal.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "the sets relate positions of one sequence to each other"}
    paper = "https://arxiv.org/abs/1904.10509"
    full_budget = staticmethod(lambda length: {"stride": length})

    def __init__(
        self, spec: LayerSpec, *, stride: int, combine: str = "merged", dropout: float = 0.0, bias: bool = False
    ):
        super().__init__(spec, bias=bias)
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        if combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine}")
        if combine == "heads" and spec.num_heads == 1:
            raise ValueError('combine="heads" needs at least 2 heads, got num_heads=1; nearest: "layers"')
        self.stride, self.dropout = stride, dropout
        every = list(range(spec.num_heads))
        plans: dict[str, list[tuple[list[int], list[int]]]] = {  # which heads take which steps
            "merged": [(every, [1, 2])],
            "heads": [(every[::2], [1]), (every[1::2], [2])],
            "layers": [(every, [1 + spec.layer % 2])],
        }
        self.plan = plans[combine]
        self.steps = {step for _, steps in self.plan for step in steps}

    # -- what the two patterns say ----------------------------------------------------------------

    @abstractmethod
    def near(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether position j is in A1 of i, past or not."""

    @abstractmethod
    def far(self, i: Tensor, j: Tensor, heads: Sequence[int]) -> Tensor:
        """Whether j is in A2 of i; the first axis is that of the heads where they differ."""

    @abstractmethod
    def near_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Scores with a superset of A1, from blocks q, k, v [B, H, N, l, D]."""

    @abstractmethod
    def far_part(self, q: Tensor, k: Tensor, v: Tensor, heads: Sequence[int]) -> Part:
        """Scores with a superset of A2."""

    @abstractmethod
    def held(self, length: int) -> Tensor:
        """Positions that decoding keeps after `length`, ascending: [G, n] on the CPU."""

    # -- written once -----------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        k, v = repeat_heads(k, self.spec.num_heads), repeat_heads(v, self.spec.num_heads)
        real = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        if len(self.plan) == 1:
            return self._read_blocks(q, k, v, real, *self.plan[0])
        parts = [
            self._read_blocks(q[:, :, own], k[:, :, own], v[:, :, own], real, own, steps) for own, steps in self.plan
        ]
        order = [head for own, _ in self.plan for head in own]
        return torch.cat(parts, dim=2)[:, :, [order.index(head) for head in range(len(order))]]

    def _read_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, heads: Sequence[int], steps: Sequence[int]
    ) -> Tensor:
        length = q.shape[1]
        count = math.ceil(length / self.stride)
        q, k, v = (  # [B, T, H, D] -> [B, H, N, l, D]
            F.pad(x, (0, 0, 0, 0, 0, count * self.stride - length)).transpose(1, 2).unflatten(2, (count, self.stride))
            for x in (q * q.shape[-1] ** -0.5, k, v)
        )
        i = torch.arange(count * self.stride, device=q.device).view(1, count, self.stride, 1)
        scores, visible, reads = [], [], []
        for step in steps:
            score, j, read = self.near_part(q, k, v) if step == 1 else self.far_part(q, k, v, heads)
            seen = self.near(i, j) if step == 1 else self.far(i, j, heads)
            if step == 2 and 1 in steps:
                seen = seen & ~self.near(i, j)  # in both sets: counted once
            seen = seen & (j >= 0) & (j < length) & (j <= i if self.spec.causal else True)
            scores.append(score)
            visible.append((seen & real[:, j.clamp(0, length - 1)]).expand(score.shape))
            reads.append(read)
        weights = masked_softmax(torch.cat(scores, -1), torch.cat(visible, -1)).to(v.dtype)
        shares = F.dropout(weights, self.dropout, self.training).split([score.shape[-1] for score in scores], -1)
        output = torch.stack([read(share) for read, share in zip(reads, shares, strict=True)]).sum(0)
        return output.flatten(2, 3)[:, :, :length].transpose(1, 2)

    def init_memory(self, batch_size: int, like: Tensor) -> Kept:
        shape = batch_size, 0, self.spec.kv_heads
        return Kept(k=like.new_empty(*shape, self.key_dim), v=like.new_empty(*shape, self.value_dim))

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Kept:
        assert isinstance(state, Kept)
        length = state.position + k.shape[1]
        new = torch.arange(state.position, length).expand(self.spec.kv_heads, -1)
        at = torch.searchsorted(torch.cat([self.held(state.position), new], dim=1), self.held(length).contiguous())
        at = at.T[None, :, :, None].to(k.device)  # a copy of what is kept, group by group
        keep = [torch.cat(pair, dim=1).take_along_dim(at, dim=1) for pair in ((state.k, k), (state.v, v))]
        return Kept(k=keep[0], v=keep[1], position=length)

    def state_bytes(self, length: int) -> int:
        return 4 * self.held(length).numel() * (self.key_dim + self.value_dim)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, Kept)
        k, v = (repeat_heads(x, self.spec.num_heads).transpose(1, 2) for x in (state.k, state.v))
        j = self.held(state.position).repeat_interleave(self.spec.num_heads // self.spec.kv_heads, dim=0)
        i, visible = torch.tensor(state.position - 1), torch.zeros_like(j, dtype=torch.bool)
        for own, steps in self.plan:
            if 1 in steps:
                visible[own] |= self.near(i, j[own])
            if 2 in steps:
                visible[own] |= self.far(i, j[own, None, None], own).flatten(1)
        scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.mT
        weights = masked_softmax(scores, visible[:, None].to(q.device)).to(v.dtype)
        return (weights @ v).transpose(1, 2)
