"""NSA: compressed blocks, selected blocks and a window, each with keys of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State, rotary
from attentions.sparse._compression import Compression, any_in_block, compressed_weights, share_out
from attentions.sparse._selection import Selection, largest, nearby, sparse_attention

Pair = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class Branches(State):
    """Keys [B, S, G, K] and values [B, S, G, V] that later queries read, by branch.

    compressed: of the complete blocks; tail: positions of which some block is still incomplete, fewer than its length;
    selected: all positions; window: the latest `window`.
    """

    compressed: Pair
    tail: Pair
    selected: Pair
    window: Pair


class NSA(Attention):
    """o = sum over three branches of g^c softmax(q K^c / sqrt(D)) V^c, g^c = sigmoid(W^c x) per head.

    Compression (l, d): a block of l positions every d becomes one key and one value, by an MLP phi; a query reads those
    of complete blocks. Selection (l', n): the weights on the compressed blocks, summed over the strides that a block
    of l' positions shares with them and over the heads of a group, rank the blocks; the first n are read in full, among
    them always the initial ones and the local ones. Window (w): the latest w positions. The query is shared, keys and
    values are projected for each branch apart, so that no branch shortcuts another. Noncausal: every block and both
    sides of the window. A branch without a key reads zero.

    Parameters: 2 M^2 + 6 M^2 G / H + 3 M H + 2 (l D^2 + D^2 + l D); softmax attention has 2 M^2 + 2 M^2 G / H. With
    G = H that is twice as many and phi: 2.7 times as many for M = 32, H = 2, l = 4.

    Args:
        compress_block, compress_stride: l and d; d divides l.
        select_block, num_selected: l' >= l, a multiple of d, and n, initial and local blocks included.
        num_initial, num_local: blocks at the start, and up to the query's own, that are always selected.
        window: w, own position included.
        dropout: probability of dropping an attention weight in training, after blocks are ranked.

    Source: Yuan et al. 2025, https://arxiv.org/abs/2502.11089, section 3, eq. 5 and 7-12, with its defaults (eq. 9
    counts blocks from 1).
    Differs: phi is a GELU layer of width D without biases and the gate one linear map, where the paper says MLP; rotary
    positions turn keys before compression, as in flash-linear-attention's code (another port turns them after it); the
    noncausal form is ours.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "its window needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2502.11089"
    complexity = "T (S / compress_stride + num_selected select_block + window)"
    selects = True

    def __init__(
        self,
        spec: LayerSpec,
        *,
        compress_block: int = 32,
        compress_stride: int = 16,
        select_block: int = 64,
        num_selected: int = 16,
        num_initial: int = 1,
        num_local: int = 2,
        window: int = 512,
        dropout: float = 0.0,
    ):
        super().__init__(spec)
        for name, value, least in (
            ("compress_stride", compress_stride, 1),
            ("num_initial", num_initial, 0),
            ("num_local", num_local, 1),
            ("window", window, 1),
            ("compress_block", compress_block, compress_stride),
            ("select_block", select_block, compress_block),
            ("num_selected", num_selected, num_initial + (num_local if spec.causal else 2 * num_local - 1)),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, value in (("compress_block", compress_block), ("select_block", select_block)):
            if rest := value % compress_stride:
                near = f"{value - rest}, {value - rest + compress_stride}"
                raise ValueError(f"compress_stride={compress_stride} must divide {name}, got {value}; nearest: {near}")
        if spec.rotary_base is not None and spec.head_dim % 2:
            raise ValueError(f"rotary positions need an even width per head, got {spec.head_dim}")
        self.compress_block, self.compress_stride = compress_block, compress_stride
        self.select_block, self.num_selected = select_block, num_selected
        self.num_initial, self.num_local = num_initial, num_local
        self.window, self.dropout = window, dropout
        heads, groups, width = spec.num_heads, spec.kv_heads, spec.head_dim
        self.q_proj = nn.Linear(spec.dim, heads * width, bias=False)
        # for compression, selection and window, in this order
        self.k_proj, self.v_proj = (nn.Linear(spec.dim, 3 * groups * width, bias=False) for _ in "kv")
        self.compress_k, self.compress_v = (Compression(width, compress_block, compress_stride) for _ in "kv")
        self.gate_proj = nn.Linear(spec.dim, 3 * heads, bias=False)
        self.out_proj = nn.Linear(heads * width, spec.dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        q, (compression, selection, window) = self.query(x), self.key_value(x)
        compressed = self.compress_k(compression[0], key_mask), self.compress_v(compression[1], key_mask)
        near = nearby(x.shape[1], self.window, causal=self.spec.causal, device=x.device)
        local = sparse_attention(q, *window, near, key_mask=key_mask, dropout=self._dropout)
        return self.merge(x, *self.read_blocks(q, compressed, selection, key_mask), local)

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        """[B, T, H, K], rotated from position `start` where the spec asks for it."""
        return self._rotate(self.q_proj(x).unflatten(-1, (self.spec.num_heads, -1)), start)

    def key_value(self, x: Tensor, start: int = 0) -> list[Pair]:
        """Keys [B, S, G, K] and values [B, S, G, V] of each branch."""
        keys, values = (proj(x).unflatten(-1, (3, self.spec.kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        return [(self._rotate(k, start), v) for k, v in zip(keys.unbind(2), values.unbind(2), strict=True)]

    def read_blocks(
        self, q: Tensor, compressed: Pair, selection: Pair, key_mask: Tensor | None = None, start: int = 0
    ) -> Pair:
        """What the queries from position `start` on read of the compressed and of the selected blocks."""
        (keys, values), sizes = compressed, (self.compress_block, self.compress_stride)
        weights = compressed_weights(q, keys, *sizes, causal=self.spec.causal, start=start, key_mask=key_mask)
        blocks = self.select(weights.detach().sum(2), selection[0].shape[1], key_mask, start)
        weights = F.dropout(weights, self._dropout) if self._dropout else weights
        coarse = weights.to(values.dtype) @ values.transpose(1, 2)[:, :, None]  # [B, G, H / G, T, V]
        chosen = Selection(blocks, self.select_block, causal=self.spec.causal, start=start)
        fine = sparse_attention(q, *selection, chosen, key_mask=key_mask, dropout=self._dropout)
        return coarse.permute(0, 3, 1, 2, 4).flatten(2, 3), fine

    def select(self, weights: Tensor, length: int, key_mask: Tensor | None, start: int) -> Tensor:
        """From weights [B, G, T, N] on the compressed blocks to selected blocks [B, G, T, n] of `length` positions."""
        num_blocks = -(-length // self.select_block)
        scores = share_out(weights, self.compress_block, self.compress_stride, self.select_block, num_blocks)
        block = torch.arange(num_blocks, device=weights.device)
        behind = (start + torch.arange(weights.shape[2], device=weights.device))[:, None] // self.select_block - block
        always = (block < self.num_initial) | (behind.abs() < self.num_local)
        scores = scores.masked_fill(always, math.inf)
        if self.spec.causal:
            scores = scores.masked_fill(behind < 0, -math.inf)
        if key_mask is not None:
            padded = F.pad(key_mask, (0, num_blocks * self.select_block - length))
            kept = any_in_block(padded, self.select_block, self.select_block)
            scores = scores.masked_fill(~kept[:, None, None], -math.inf)
        return largest(scores, self.num_selected)

    def merge(self, x: Tensor, *branches: Tensor) -> Tensor:
        """The gated sum of the branches [B, T, H, V], back in the stream [B, T, M]."""
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (-1, 3)).unbind(-1)
        heads = sum(gate[..., None] * branch for gate, branch in zip(gates, branches, strict=True))
        return self.out_proj(heads.flatten(2))

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Branches:
        x = self.out_proj.weight.new_empty(batch_size, 0, self.spec.kv_heads, self.spec.head_dim)
        return Branches(compressed=(x, x), tail=(x, x), selected=(x, x), window=(x, x))

    def write(self, x: Tensor, state: Branches) -> Branches:
        """The state after further positions x [B, S, M]."""
        compression, selection, window = self.key_value(x, state.position)

        def joined(old: Pair, new: Pair) -> Pair:
            return torch.cat([old[0], new[0]], dim=1), torch.cat([old[1], new[1]], dim=1)

        tail = joined(state.tail, compression)
        new = self.compress_k(tail[0]), self.compress_v(tail[1])
        done, (keys, values) = new[0].shape[1] * self.compress_stride, joined(state.window, window)
        return Branches(
            compressed=joined(state.compressed, new),
            tail=(tail[0][:, done:].clone(), tail[1][:, done:].clone()),  # clone: a view would keep the rest alive
            selected=joined(state.selected, selection),
            window=(keys[:, -self.window :].clone(), values[:, -self.window :].clone()),
            position=state.position + x.shape[1],
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, Branches]:
        assert isinstance(state, Branches)
        q, start, state = self.query(x, state.position), state.position, self.write(x, state)
        everything = Selection(torch.zeros(1, 1, 1, 1, dtype=torch.long, device=x.device), state.window[0].shape[1])
        local = sparse_attention(q, *state.window, everything, dropout=self._dropout)
        return self.merge(x, *self.read_blocks(q, state.compressed, state.selected, start=start), local), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self(x), self.write(x, self.init_state(x.shape[0]))

    def state_bytes(self, length: int) -> int:
        blocks = max(0, (length - self.compress_block) // self.compress_stride + 1)
        held = blocks + length - blocks * self.compress_stride + length + min(length, self.window)
        return 4 * 2 * held * self.spec.kv_heads * self.spec.head_dim

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        return heads if self.spec.rotary_base is None else rotary(heads, base=self.spec.rotary_base, start=start)
