"""Sparse Transformer: the strided and the fixed pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec
from attentions.sparse._factorised import Factorised, Part


class Strided(Factorised):
    """A1: the l positions before one and itself, A2: every l-th position. A row and a column when l is a line's width.

        A1(i) = {j : i - l <= j <= i}      A2(i) = {j : (i - j) mod l = 0, j <= i}

    Every position is in the column of a later one, so decoding keeps all of them (combine="layers": in layers of A1
    only the l + 1 latest). With l >= T it is softmax attention.

    Args and source: as in Factorised. A1 has l + 1 positions, as in the paper; in the authors' code it has l.
    """

    complexity = "T (stride + T / stride)"

    def near(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= self.stride

    def far(self, i: Tensor, j: Tensor, heads: Sequence[int]) -> Tensor:
        return (i - j) % self.stride == 0

    def near_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        count, sides = q.shape[2], 2 if self.spec.causal else 3

        def around(x: Tensor) -> Tensor:  # each block between its neighbours
            x = F.pad(x, (0, 0, 0, 0, 1, sides - 2))
            return torch.cat([x[:, :, n : n + count] for n in range(sides)], dim=3)

        block = torch.arange(-1, count - 1, device=q.device)[:, None, None]
        j = block * self.stride + torch.arange(sides * self.stride, device=q.device)
        return q @ around(k).mT, j[None], lambda weights: weights @ around(v)

    def far_part(self, q: Tensor, k: Tensor, v: Tensor, heads: Sequence[int]) -> Part:
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))  # columns [B, H, l, N, D]
        block = torch.arange(q.shape[3], device=q.device) * self.stride
        j = torch.arange(self.stride, device=q.device)[:, None] + block
        return (q @ k.mT).transpose(2, 3), j[None, None], lambda w: (w.transpose(2, 3) @ v).transpose(2, 3)

    def held(self, length: int) -> Tensor:
        first = 0 if 2 in self.steps else max(0, length - self.stride - 1)
        return torch.arange(first, length).expand(self.spec.kv_heads, -1)


class Fixed(Factorised):
    """A1: the own block of l positions, A2: c positions of every block, which sum it up for all later ones.

        A1(i) = {j : floor(j / l) = floor(i / l)}      A2(i) = {j : l - c (n + 1) <= j mod l < l - c n}

    Head h has n = h mod floor(l / c): subblocks of its own, which the paper prefers. Decoding keeps, for each
    key-value head, the block that is being written and the summaries that its query heads read. l >= T is softmax.

    Args:
        num_summaries: c, from 1 to l. The others and the source: as in Factorised.
    """

    complexity = "T (stride + num_summaries T / stride)"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        stride: int,
        num_summaries: int,
        combine: str = "merged",
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, stride=stride, combine=combine, dropout=dropout, bias=bias)
        if not 1 <= num_summaries <= stride:
            raise ValueError(f"num_summaries must be from 1 to stride={stride}, got {num_summaries}")
        self.num_summaries = num_summaries

    def near(self, i: Tensor, j: Tensor) -> Tensor:
        return i // self.stride == j // self.stride

    def far(self, i: Tensor, j: Tensor, heads: Sequence[int]) -> Tensor:
        start = torch.tensor([self._start(head) for head in heads], device=j.device)[:, None, None, None]
        return (j % self.stride >= start) & (j % self.stride < start + self.num_summaries)

    def near_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        j = torch.arange(q.shape[2] * self.stride, device=q.device).view(1, -1, 1, self.stride)
        return q @ k.mT, j, lambda weights: weights @ v

    def far_part(self, q: Tensor, k: Tensor, v: Tensor, heads: Sequence[int]) -> Part:
        inside = torch.tensor([self._summary(head) for head in heads], device=q.device)  # [H, c]

        def summaries(x: Tensor) -> Tensor:  # of all blocks, for every block of queries: [B, H, 1, N * c, D]
            return x.take_along_dim(inside[None, :, None, :, None], dim=3).flatten(2, 3)[:, :, None]

        j = torch.arange(q.shape[2], device=q.device)[:, None] * self.stride + inside[:, None]
        values = summaries(v)
        return q @ summaries(k).mT, j.flatten(1)[:, None, None], lambda weights: weights @ values

    def held(self, length: int) -> Tensor:
        groups, current = self.spec.kv_heads, max(0, length - 1) // self.stride  # the block of the latest position
        kept = torch.zeros(groups, self.stride, dtype=torch.bool)
        for head in range(self.spec.num_heads if 2 in self.steps else 0):
            kept[head * groups // self.spec.num_heads, self._summary(head)] = True
        offset = kept.nonzero()[:, 1].view(groups, 1, -1)  # neighbouring heads: as many for each group
        before = (offset + torch.arange(current)[:, None] * self.stride).flatten(1)
        return torch.cat([before, torch.arange(current * self.stride, length).expand(groups, -1)], dim=1)

    def _start(self, head: int) -> int:
        return self.stride - self.num_summaries * (1 + head % (self.stride // self.num_summaries))

    def _summary(self, head: int) -> list[int]:
        return list(range(self._start(head), self._start(head) + self.num_summaries))
