"""Long-short attention (Transformer-LS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, State, repeat_heads
from attentions.linear._recurrence import wide
from attentions.lowrank._blocks import masked_softmax, pooled, segments, tiles


@dataclass(kw_only=True)
class LongShortState(State):
    """Keys and values [B, S, G, D]: normed ones of the window, the rows, and bare ones of the chunk not yet complete.

    The last wait with their `logits` [B, S, G, r]. `seen` [B, r]: rows of a masked context that stand for anything.
    """

    near: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]
    seen: Tensor | None = None


class LongShort(QKVAttention):
    """One softmax over a window and over a few rows that stand for the rest, each with a layer norm of its own.

    P = softmax(x W_p) over positions [S, r], K' = LN_G(P^T K), V' = LN_G(P^T V); a query reads the keys
    [K'; LN_L(K of its window)] and the values alike (DualLN: a norm for the rows, another for the window).

    Noncausal self: positions fall into segments of `window`, and a query's window is its segment and window // 2
    positions to either side; r = num_landmarks rows stand for the whole sequence. Causal self: the window is the
    `window` latest positions, and each chunk of `chunk_size` becomes r = chunk_rank rows, read from the next chunk on.
    Cross: no window, since queries and context share no positions, and num_landmarks rows of the context.

    4 M^2 parameters, M r G for W_p and 4 D for the norms: 1.06 of softmax for CAB's noncausal form (M = 512, H = 8,
    r = 16), 1.08 at M = 32, H = 2, r = 4, and 1.03 for the causal form there.

    Args:
        window: positions seen near by, own included.
        num_landmarks: rows r in noncausal self- and in cross-attention.
        chunk_size, chunk_rank: positions of a chunk and its rows r in causal self-attention.
        dropout: of the weights, in training.
        bias: bias on the four projections.

    Source: Zhu et al. 2021, https://arxiv.org/abs/2107.02192, sections 3.2 to 3.4.
    Differs: norms act on a head, as in the paper's equations; the authors' code takes all heads together, and that
    for LRA pools keys and values to which LN_L was applied before (that for language modelling bare ones). W_p has no
    bias, which its softmax would cancel. Their language model adds a relative bias as in Transformer-XL (1.5 times the
    parameters); here positions are the backbone's, and where it asks for rotary ones they turn the window, while the
    rows stand at no position. Their code has no cross form.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2107.02192"
    complexity = "T (window + num_landmarks), causal: T (window + T chunk_rank / chunk_size)"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        window: int = 8,
        num_landmarks: int = 32,
        chunk_size: int = 16,
        chunk_rank: int = 1,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, bias=bias)
        sizes = {"window": window, "num_landmarks": num_landmarks, "chunk_size": chunk_size, "chunk_rank": chunk_rank}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.window, self.chunk_size, self.dropout = window, chunk_size, dropout
        self.chunked = spec.pattern == Pattern.CAUSAL_SELF
        self.rank = chunk_rank if self.chunked else num_landmarks
        self.pool_proj = nn.Linear(spec.dim, spec.kv_heads * self.rank, bias=False)  # W_p
        self.row_norm = nn.LayerNorm(self.key_dim)  # LN_G
        self.near_norm = None if spec.cross else nn.LayerNorm(self.key_dim)  # LN_L

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return self.q_proj(x).unflatten(-1, (self.spec.num_heads, self.key_dim))  # turned where it meets the window

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        k, v = self.k_proj(source), self.v_proj(source)
        return k.unflatten(-1, (-1, self.key_dim)), v.unflatten(-1, (-1, self.value_dim))

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        return {"logits": self.pool_proj(source).unflatten(-1, (self.spec.kv_heads, self.rank))}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        length = q.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            *rows, seen = self._compress(k, v, terms["logits"], key_mask)
            seen = seen[:, None].expand(-1, length, -1)
            if self.chunked:
                chunk_of_row = torch.arange(seen.shape[2], device=q.device) // self.rank
                chunk = torch.arange(length, device=q.device) // self.chunk_size
                seen = seen & (chunk_of_row < chunk[:, None])
            far_k, far_v = (self._heads(x) for x in rows)
            scores = self._heads(q) @ far_k.mT
            if self.spec.cross:
                return (self._weights(scores, seen) @ far_v).transpose(1, 2).to(q.dtype)

            # segments of queries [B, H, N, window, D] and the tiles of keys around them [B, H, N, D, tile]
            window = min(self.window, length)
            before, after = (window - 1, 0) if self.spec.causal else (window // 2, window // 2)
            tile = before + window + after
            near_k, near_v = (tiles(self._heads(x), window, before, after) for x in self._near(k, v, 0))
            known = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
            near_seen = tiles(known[..., None], window, before, after).expand(-1, -1, window, -1)
            if self.spec.causal:
                ahead = torch.arange(tile, device=q.device) - torch.arange(window, device=q.device)[:, None]
                near_seen = near_seen & (ahead >= 0) & (ahead < window)  # the first key of a tile is window - 1 behind
            near = segments(self._heads(self._rotate(q, 0)), window) @ near_k
            scores, seen = segments(scores, window), segments(seen, window)
            weights = self._weights(torch.cat([scores, near], dim=-1), torch.cat([seen, near_seen], dim=-1))
            far, near = weights.split([scores.shape[-1], tile], dim=-1)
            heads = (far @ far_v[:, :, None] + near @ near_v.mT).flatten(2, 3)[:, :, :length]
            return heads.transpose(1, 2).to(q.dtype)

    def init_memory(self, batch_size: int, like: Tensor) -> LongShortState:
        widths = self.key_dim, self.value_dim, self.rank
        k, v, logits = (wide(like.new_empty(batch_size, 0, self.spec.kv_heads, width)) for width in widths)
        return LongShortState(near=(k, v), rows=(k, v), rest=(k, v, logits))

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> LongShortState:
        assert isinstance(state, LongShortState)
        new, position = (k, v, terms["logits"]), state.position + k.shape[1]
        with torch.autocast(k.device.type, enabled=False):
            if self.spec.cross:  # written once
                *rows, any_of = self._compress(*new, key_mask)
                seen = None if key_mask is None else any_of
                return LongShortState(near=state.near, rows=tuple(rows), rest=state.rest, seen=seen, position=position)
            near = (torch.cat(pair, dim=1) for pair in zip(state.near, self._near(k, v, state.position), strict=True))
            waiting = tuple(torch.cat([old, wide(x)], dim=1) for old, x in zip(state.rest, new, strict=True))
            *added, _ = self._compress(*waiting)
            done = waiting[0].shape[1] // self.chunk_size * self.chunk_size
            return LongShortState(  # cloned: a view would keep dropped positions alive
                near=tuple(x[:, -self.window :].clone() for x in near),
                rows=tuple(torch.cat(pair, dim=1) for pair in zip(state.rows, added, strict=True)),
                rest=tuple(x[:, done:].clone() for x in waiting),
                position=position,
            )

    def state_bytes(self, length: int) -> int:
        pair = self.key_dim + self.value_dim
        if self.spec.cross:
            return 4 * self.spec.kv_heads * self.rank * pair
        rows = length // self.chunk_size * self.rank
        rest = length % self.chunk_size * (pair + self.rank)
        return 4 * self.spec.kv_heads * ((min(length, self.window) + rows) * pair + rest)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, LongShortState)
        with torch.autocast(q.device.type, enabled=False):
            # a chunk that ends with the query is read from the next position on
            visible = (state.position - 1) // self.chunk_size * self.rank if self.chunked else self.rank
            far_k, far_v = (self._heads(x[:, :visible]) for x in state.rows)
            near_k, near_v = (self._heads(x) for x in state.near)
            scores = self._heads(q) @ far_k.mT
            if not self.spec.cross:
                near = self._heads(self._rotate(q, state.position - 1)) @ near_k.mT
                scores = torch.cat([scores, near], dim=-1)
            seen = scores.new_ones(1, 1, 1, dtype=torch.bool) if state.seen is None else state.seen[:, None]
            heads = self._weights(scores, seen) @ torch.cat([far_v, near_v], dim=2)
            return heads.transpose(1, 2).to(q.dtype)

    def _compress(
        self, k: Tensor, v: Tensor, logits: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of all complete chunks, keys and values [B, N r, G, D], and which stand for anything [B, N r]."""
        size = self.chunk_size if self.chunked else k.shape[1]
        k, v, seen = pooled(wide(k), wide(v), wide(logits), size, key_mask)
        return _norm(self.row_norm, k), _norm(self.row_norm, v), seen

    def _near(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values as a window holds them."""
        assert self.near_norm is not None
        k, v = _norm(self.near_norm, wide(k)), _norm(self.near_norm, wide(v))
        return self._rotate(k, start), v

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, G or H, D] -> [B, H, S, D]."""
        return repeat_heads(wide(x), self.spec.num_heads).transpose(1, 2)

    def _weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Softmax of the scaled scores [B, H, ...] where seen [B, ...]."""
        weights = masked_softmax(scores * self.key_dim**-0.5, seen[:, None])
        return F.dropout(weights, self.dropout, self.training)


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """The layer norm in the precision of x, whatever that of its parameters."""
    return F.layer_norm(x, x.shape[-1:], wide(layer.weight), wide(layer.bias), layer.eps)
