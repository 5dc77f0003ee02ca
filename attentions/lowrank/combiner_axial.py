"""Combiner over the rows and columns of an image, or of a sequence cut into rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State
from attentions.dense.softmax import KVCache
from attentions.linear._recurrence import wide
from attentions.lowrank._blocks import segments
from attentions.lowrank._coarse import Pooling, cut, known, summarise, summarise_after, summarise_before
from attentions.sparse._selection import masked_softmax


class _Rows(Pooling):
    """Positions in rows of `columns`: those of the grid, where the slot has one.

    Raises:
        ValueError: for columns below 1, and in forward for a sequence that does not fill the grid.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a query reads its own row and column, and it has none in a context"}
    paper = "https://arxiv.org/abs/2107.05768"

    def __init__(self, spec: LayerSpec, *, columns: int, dropout: float, bias: bool):
        super().__init__(spec, dropout=dropout, bias=bias)
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        self.columns = columns if spec.grid is None or len(spec.grid) < 2 else math.prod(spec.grid[1:])

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        self._check(x)
        return super().forward(x, context, key_mask=key_mask)

    def _check(self, x: Tensor) -> None:
        if (grid := self.spec.grid) is not None and x.shape[1] != math.prod(grid):
            raise ValueError(f"a grid of {grid} holds {math.prod(grid)} positions, got {x.shape[1]}")

    def _others(self, size: int, device: torch.device) -> Tensor:
        """Which rows a query reads beside its own [size, size]: causal, those before it."""
        every = torch.ones(size, size, dtype=torch.bool, device=device)
        return every.tril(-1) if self.spec.causal else every ^ torch.eye(size, dtype=torch.bool, device=device)

    def _joint(self, q: Tensor, along: tuple[Tensor, Tensor, Tensor], across: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """One softmax over keys that a row shares and keys that a column shares.

        Args:
            q: [B, H, R, C, K], scaled.
            along: keys [B, H, R, X, K], values [B, H, R, X, V] and who sees them [B or 1, 1, R, C, X].
            across: keys [B, H, C, Y, K], values [B, H, C, Y, V] and who sees them [B or 1, 1, C, R, Y].

        Returns:
            [B, R C, H, V].
        """
        scores = torch.cat([q @ along[0].mT, (q.transpose(2, 3) @ across[0].mT).transpose(2, 3)], dim=-1)
        weights = self._weights(scores, torch.cat([along[2], across[2].transpose(2, 3)], dim=-1))
        row, column = weights.split([along[0].shape[3], across[0].shape[3]], dim=-1)
        heads = row @ along[1] + (column.transpose(2, 3) @ across[1]).transpose(2, 3)
        return heads.flatten(2, 3).transpose(1, 2)


@dataclass(kw_only=True)
class AxialState(KVCache):
    """All keys and values, and all queries [B, T, H, K]."""

    q: Tensor


class CombinerAxial(_Rows):
    """Full attention along the own row and column, and through summaries of all other ones: the axial mixture.

    The query at row s and column n reads in one softmax
        its column above it, (t, n) for t < s, and its row up to itself, (s, m) for m <= n, directly;
        of every other column m the part above, (t, m) for t < s, as a region;
        of every row t < s the parts left and right of its column, (t, m) for m < n and for m > n, as a region each.
    Columns and rows so cover the earlier rows twice: a mixture of two factorisations. Keys and inner weights of
    regions are those of CombinerFixed, their maxima running ones. Noncausal, the own row and column are read in full
    and so are the parts of columns above and below and the sides of all other rows. With one column, or T, it is
    softmax attention.

    Decoding keeps all keys, values and queries: the next row shares every column out anew.

    Args:
        columns: positions in a row, about sqrt(T); a slot with a grid has its own.
        dropout: of the joint weights, in training.
        bias: bias on the four projections.

    Source: Ren et al. 2021, https://arxiv.org/abs/2107.05768, Combiner-Axial, after the authors' code in JAX (section
    and equation numbers not confirmed from the paper's text).
    Differs: their TensorFlow code has running sums in place of running maxima. Their noncausal form (TensorFlow only)
    reads the own position twice, the own row and column as regions besides, and a region without positions as the mean
    of its whole line; here each of its groups is as in the causal form. A last row may be short. Where the backbone
    asks for rotary positions, turned queries and keys are pooled. Of a masked region only the unmasked positions count.
    """

    complexity = "T (columns + T / columns)"
    full_budget = staticmethod(lambda length: {"columns": 1})

    def __init__(self, spec: LayerSpec, *, columns: int = 128, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, columns=columns, dropout=dropout, bias=bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        length, width, causal = q.shape[1], self.columns, self.spec.causal
        with torch.autocast(q.device.type, enabled=False):
            rows_q, rows_k, rows_v = (segments(self._heads(x), width) for x in (q, k, v))  # [B, H, R, C, D]
            seen = cut(known(k, key_mask), width)
            own = seen.new_ones(width, width)
            beside, others = own ^ own.tril().triu(), self._others(rows_k.shape[2], q.device)

            columns_q, columns_k, columns_v = (x.transpose(2, 3) for x in (rows_q, rows_k, rows_v))
            columns_seen = seen.mT
            along = [(rows_k, rows_v, seen[..., None, :] & (own.tril() if causal else own))]
            across = [(columns_k, columns_v, columns_seen[..., None, :] & others)]
            for summary in (summarise_before,) if causal else (summarise_before, summarise_after):
                key, value, any_seen = summary(columns_q, columns_k, columns_v, columns_seen)
                along.append((key.transpose(2, 3), value.transpose(2, 3), any_seen.mT[..., None, :] & beside))
            for summary in (summarise_before, summarise_after):
                key, value, any_seen = summary(rows_q, rows_k, rows_v, seen)
                across.append((key.transpose(2, 3), value.transpose(2, 3), any_seen.mT[..., None, :] & others))
            heads = self._joint(rows_q * self.key_dim**-0.5, _joined(along), _joined(across))
            return heads[:, :length].to(q.dtype)

    def init_memory(self, batch_size: int, like: Tensor) -> AxialState:
        heads, groups = self.spec.num_heads, self.spec.kv_heads
        q, k, v = (
            wide(like.new_empty(batch_size, 0, *shape))
            for shape in ((heads, self.key_dim), (groups, self.key_dim), (groups, self.value_dim))
        )
        return AxialState(q=q, k=k, v=v)

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> AxialState:
        assert isinstance(state, AxialState)
        pairs = (state.q, terms["own"]), (state.k, k), (state.v, v)
        q, k, v = (torch.cat([old, wide(new)], dim=1) for old, new in pairs)
        return AxialState(q=q, k=k, v=v, position=q.shape[1])

    def state_bytes(self, length: int) -> int:
        pair = self.spec.kv_heads * (self.key_dim + self.value_dim)
        return 4 * length * (pair + self.spec.num_heads * self.key_dim)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, AxialState)
        row, column = divmod(state.position - 1, self.columns)
        with torch.autocast(q.device.type, enabled=False):
            heads = [self._heads(x) for x in (state.q, state.k, state.v)]
            start = row * self.columns
            parts = [(heads[1][:, :, start:], heads[2][:, :, start:])]
            if row:
                image = [x[:, :, :start].unflatten(2, (row, self.columns)) for x in heads]
                parts.append((image[1][:, :, :, column], image[2][:, :, :, column]))
                left, right = ([x[:, :, :, side] for x in image] for side in (slice(column), slice(column + 1, None)))
                above = [torch.cat(pair, dim=3).transpose(2, 3) for pair in zip(left, right, strict=True)]
                for own, key, value in (above, left, right):
                    if count := key.shape[2] * key.shape[3]:
                        seen = own.new_ones(1, 1, count // key.shape[3], key.shape[3], dtype=torch.bool)
                        parts.append(summarise(own, key, value, seen)[:2])
            key, value = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
            weights = (self._heads(q) @ key.mT * self.key_dim**-0.5).softmax(-1)
            return (weights @ value).transpose(1, 2).to(q.dtype)


@dataclass(kw_only=True)
class RowmajorState(State):
    """Regions of finished rows and the row of the latest position.

    Args:
        regions: keys [B, N, G, K] and values [B, N, H, V] at every position of the N / columns finished rows.
        row: of the 1 to `columns` latest positions inputs [B, n, 1, M], queries [B, n, H, K], keys [B, n, G, K] and
            values [B, n, G, V]; of none before the first.
    """

    regions: tuple[Tensor, ...]
    row: tuple[Tensor, ...]


class CombinerRowmajor(_Rows):
    """Full attention along the own row, and one region with a learned key for every other row.

    The region of row t for a query in column n has as its value what the position (t, n) reads in attention over its
    whole row, u = softmax(q k^T / sqrt(K)) v, and as its key norm(x + u W_1) W_2 with the input x of that position.
    The query reads its row up to itself and the regions of the rows before it in one softmax. Noncausal, it reads its
    whole row and the regions of all others. With T columns it is softmax attention.

    4 M^2 + 2 M^2 + 2 M parameters: 1.5 times those of softmax attention. Decoding keeps a key and a value for each
    position of finished rows, and the row that is being written.

    Args:
        columns: positions in a row, about sqrt(T); a slot with a grid has its own.
        dropout: of the joint weights and of u W_1, in training.
        bias: bias on the six projections.

    Source: Ren et al. 2021, https://arxiv.org/abs/2107.05768, after the authors' code, its row-major axial attention
    (whether the paper describes it, and where, is not confirmed from its text).
    Differs: their dropout acts on the weights of the own row and inside regions. Their noncausal form reads the own
    row a second time, as a region; here it does not. A last row may be short: noncausal, the columns that it lacks do
    not read it. The region at a masked position is not read, since its key and value come from it. Where the backbone
    asks for rotary positions, a region's key is turned as that of its position.
    """

    complexity = "T (columns + T / columns)"
    full_budget = staticmethod(lambda length: {"columns": length})

    def __init__(self, spec: LayerSpec, *, columns: int = 128, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, columns=columns, dropout=dropout, bias=bias)
        self.summary_proj = nn.Linear(spec.num_heads * self.value_dim, spec.dim, bias=bias)  # W_1
        self.summary_norm = nn.LayerNorm(spec.dim)
        self.row_proj = nn.Linear(spec.dim, spec.kv_heads * self.key_dim, bias=bias)  # W_2

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        # past attend: the contract asks of it that heads stay apart, and here they meet in W_1
        self._check(self._source(x, context))
        return self.merge(x, self._read_all(self.query(x), *self.key_value(x), key_mask=key_mask, **self.terms(x)))

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        return {"stream": source}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return self._read_all(q, k, v, key_mask=key_mask, **terms)

    def _read_all(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None, **terms: Tensor) -> Tensor:
        length, width = q.shape[1], self.columns
        scaled, keys, values = (segments(self._heads(x), width) for x in (q * self.key_dim**-0.5, k, v))
        seen = cut(known(k, key_mask), width)
        region_k, region_v = self._regions(terms["stream"], scaled, keys, values, seen)
        with torch.autocast(q.device.type, enabled=False):
            own = seen.new_ones(width, width)
            along = keys, values, seen[..., None, :] & (own.tril() if self.spec.causal else own)
            others = self._others(scaled.shape[2], q.device)
            far = [segments(self._heads(x), width).transpose(2, 3) for x in (region_k, region_v)]
            heads = self._joint(scaled, along, (far[0], far[1], seen.mT[..., None, :] & others))
            return heads[:, :length].to(q.dtype)

    def _regions(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Keys [B, S, G, K] and values [B, S, H, V] of the regions at positions from `start` on, a row's first.

        Args:
            x: [B, S, M]; q (scaled), k, v: [B, H, R, C, D]; seen: [B or 1, 1, R, C].
        """
        with torch.autocast(x.device.type, enabled=False):
            value = masked_softmax(q @ k.mT, seen[..., None, :]) @ v
            value = value.flatten(2, 3)[:, :, : x.shape[1]].transpose(1, 2)
        summary = F.dropout(self.summary_proj(value.flatten(2).to(x.dtype)), self.dropout, self.training)
        key = self.row_proj(self.summary_norm(x + summary)).unflatten(-1, (-1, self.key_dim))
        return self._rotate(key, start), value

    def init_memory(self, batch_size: int, like: Tensor) -> RowmajorState:
        heads, groups = self.spec.num_heads, self.spec.kv_heads
        k, v = (like.new_empty(batch_size, 0, groups, width) for width in (self.key_dim, self.value_dim))
        x, q = (like.new_empty(batch_size, 0, *shape) for shape in ((1, self.spec.dim), (heads, self.key_dim)))
        value = wide(like.new_empty(batch_size, 0, heads, self.value_dim))
        return RowmajorState(regions=(k, value), row=(x, q, k, v))

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> RowmajorState:
        assert isinstance(state, RowmajorState)
        new = terms["stream"][:, :, None], terms["own"], k, v
        row = [torch.cat(pair, dim=1) for pair in zip(state.row, new, strict=True)]
        done = (row[0].shape[1] - 1) // self.columns * self.columns  # a row that ends here is still read directly
        x, *heads = (x[:, :done] for x in row)
        q, k, v = (segments(self._heads(x), self.columns) for x in heads)
        seen = cut(known(row[2][:, :done], None), self.columns)
        added = self._regions(x[:, :, 0], q * self.key_dim**-0.5, k, v, seen, start=state.regions[0].shape[1])
        return RowmajorState(  # cloned: a view would keep dropped positions alive
            regions=tuple(torch.cat(pair, dim=1) for pair in zip(state.regions, added, strict=True)),
            row=tuple(x[:, done:].clone() for x in row),
            position=state.position + terms["own"].shape[1],
        )

    def state_bytes(self, length: int) -> int:
        heads, groups = self.spec.num_heads, self.spec.kv_heads
        done = max(0, length - 1) // self.columns * self.columns
        region = groups * self.key_dim + heads * self.value_dim
        position = self.spec.dim + heads * self.key_dim + groups * (self.key_dim + self.value_dim)
        return 4 * (done * region + (length - done) * position)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, RowmajorState)
        column = (state.position - 1) % self.columns
        with torch.autocast(q.device.type, enabled=False):
            pairs = zip((x[:, column :: self.columns] for x in state.regions), state.row[2:], strict=True)
            key, value = (torch.cat([self._heads(x) for x in pair], dim=2) for pair in pairs)
            weights = (self._heads(q) @ key.mT * self.key_dim**-0.5).softmax(-1)
            return (weights @ value).transpose(1, 2).to(q.dtype)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of several kinds side by side, and who sees them."""
    keys, values, seen = zip(*parts, strict=True)
    return torch.cat(keys, dim=-2), torch.cat(values, dim=-2), torch.cat(seen, dim=-1)
