"""Landmark attention: a token at the end of each block opens or shuts the whole block."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State, repeat_heads, rotary
from attentions.dense.softmax import KVCache, Softmax
from attentions.sparse._selection import (
    Selection,
    largest,
    masked_softmax,
    merge,
    sparse_attention,
    sparse_attention_lse,
)


@dataclass(kw_only=True)
class LandmarkCache(KVCache):
    """All keys and values, and the key of each block's landmark [B, N, H, K]; causal: of the complete blocks."""

    landmarks: Tensor


class Landmark(Softmax):
    """A query weighs its own block's tokens and the other blocks' landmarks in one softmax; a landmark's weight is
    shared out among the tokens of its block by a softmax of their own.

        own block c:     w_ij = P_i(j)                        P_i = softmax over tokens of c and landmarks of others
        other block b:   w_ij = P_i(landmark_b) R_ib(j)       R_ib = softmax over tokens of b
        landmarks:       0, they carry no value

    Causal, tokens of the own block up to i and landmarks of the blocks before it (`grouped_softmax` is the same for
    sequences with landmarks of their own). Noncausal, all of the own block and the landmarks of all other blocks.
    Cross, no block is the own one. The parameters are softmax attention's and one row e of width M.

    A landmark's weight is its block's exp(LSE) under another name, so reading k blocks is a merge of k + 1 softmaxes.
    With `top_k`, evaluation and decoding read the k blocks whose landmarks score highest, per query and head, besides
    the own block; training reads all, as published: there retrieval is for inference. Rotary positions are those of
    the sequence with its landmarks: token t stands at t + t // block_size.

    Args:
        block_size: tokens in a block, l_block.
        top_k: blocks retrieved in evaluation and decoding, own block not counted; None: all.
        reads_block: a landmark's key is W_k e plus what W_q e reads of the block's keys (softmax at its position). A
            published landmark is a token: from the second layer on it holds what it read of its block in the layers
            below, which a layer on its own cannot know. False: W_k e, the published first layer, where landmarks of
            all blocks differ by rotary position alone.
        dropout, bias: as in softmax attention.

    Source: Mohtashami and Jaggi 2023, https://arxiv.org/abs/2305.16300, grouped softmax as in the authors' code (the
    own block's landmark is masked for the landmark itself, too); block_size = 50 is theirs.
    Differs: landmarks are inserted by each layer and their outputs dropped, where the authors insert them in the data;
    what a landmark reads is ours; the noncausal and cross forms, where a short last block has a landmark too, are ours.
    Retrieved blocks keep their positions: the authors' stingy mapping gives blocks and query positions within the
    k + 1 latest slots, for lengths that training never saw. Their code reads everything within a chunk before it
    retrieves: here a chunk is one token. Its dropout of whole groups, off by default, is left out.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2305.16300"
    complexity = "T S; retrieving: T (S / block_size + top_k block_size)"
    selects = True
    full_budget = staticmethod(lambda length: {"block_size": length})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_size: int = 50,
        top_k: int | None = None,
        reads_block: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, or null for all blocks, got {top_k}")
        self.block_size, self.top_k, self.reads_block = block_size, top_k, reads_block
        self.landmark = nn.Parameter(torch.randn(spec.dim))  # e, of the size of a normed token

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return self._read(q, k, v, self.landmarks(k, key_mask), key_mask)

    def landmarks(self, k: Tensor, key_mask: Tensor | None, first: int = 0) -> Tensor:
        """Keys of the landmarks of the blocks of k [B, S, G, K], of which the first is number `first`: [B, N, H, K]."""
        heads = self.spec.num_heads
        blocks = _blocks(repeat_heads(k, heads), self.block_size)  # [B, N, l, H, K]
        own = repeat_heads(self._landmark_rows(self.k_proj, blocks.shape[1], first), heads)
        if not self.reads_block:
            return own.expand(blocks.shape[0], -1, -1, -1)
        query = self._landmark_rows(self.q_proj, blocks.shape[1], first)[0]
        real = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        scores = torch.einsum("nhd,bnlhd->bnhl", query * self.key_dim**-0.5, blocks)
        weights = masked_softmax(scores, _blocks(real, self.block_size)[:, :, None])
        return own + torch.einsum("bnhl,bnlhd->bnhd", weights.to(k.dtype), blocks)

    def _landmark_rows(self, projection: nn.Linear, count: int, first: int) -> Tensor:
        """e, projected and rotated to the places of `count` landmarks: [1, N, H or G, K]."""
        row, step = projection(self.landmark).unflatten(-1, (-1, self.key_dim)), self.block_size + 1
        if self.spec.rotary_base is None or self.spec.cross:
            return row.expand(1, count, -1, -1)
        places = row.expand(1, count * step, -1, -1)
        return rotary(places, base=self.spec.rotary_base, start=first * step)[:, self.block_size :: step]

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        if self.spec.rotary_base is None or self.spec.cross:
            return heads
        length, size = heads.shape[1], self.block_size
        first, inside = divmod(start, size)
        blocks = _blocks(F.pad(heads, (0, 0, 0, 0, inside, 0)), size)  # a gap for each landmark
        lengthened = F.pad(blocks, (0, 0, 0, 0, 0, 1)).flatten(1, 2)
        turned = rotary(lengthened, base=self.spec.rotary_base, start=first * (size + 1))
        return turned.unflatten(1, (-1, size + 1))[:, :, :-1].flatten(1, 2)[:, inside : inside + length]

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, key_mask: Tensor | None, start: int = 0
    ) -> Tensor:
        """[B, T, H, V] for queries from position `start` on; landmarks [B, N, H, K] may lack that of the last block."""
        own = (start + torch.arange(q.shape[1], device=q.device)) // self.block_size
        own = torch.full_like(own, -1) if self.spec.cross else own
        if self.top_k is not None and not self.training:
            return self._retrieve(q, k, v, landmarks, key_mask, own, start)
        size, causal = self.block_size, self.spec.pattern == Pattern.CAUSAL_SELF
        keys, values = (_blocks(repeat_heads(x, self.spec.num_heads), size) for x in (k, v))  # [B, N, l, H, K]
        scores = (q.transpose(1, 2) * self.key_dim**-0.5) @ keys.flatten(1, 2).permute(0, 2, 3, 1)
        scores = scores.unflatten(-1, (-1, size))
        position = torch.arange(keys.shape[1] * size, device=q.device).view(-1, size)
        visible = position < k.shape[1] if key_mask is None else _blocks(key_mask, size)[:, None, None]
        if causal:
            visible = visible & (position <= start + torch.arange(q.shape[1], device=q.device)[:, None, None])
        gates = self._gates(q, landmarks, own, key_mask)
        gates = F.pad(gates, (0, keys.shape[1] - gates.shape[-1]), value=-math.inf)
        inside = own[:, None] == torch.arange(keys.shape[1], device=q.device)
        weights = grouped_softmax(scores, gates, inside, visible).flatten(-2)
        weights = F.dropout(weights, self.dropout, self.training).to(v.dtype)
        return (weights @ values.flatten(1, 2).transpose(1, 2)).transpose(1, 2)

    def _gates(self, q: Tensor, landmarks: Tensor, own: Tensor, key_mask: Tensor | None) -> Tensor:
        """Scores of the landmarks of other blocks, -inf for those not to be read: [B, H, T, N]."""
        gates = (q.transpose(1, 2) * self.key_dim**-0.5) @ landmarks.permute(0, 2, 3, 1)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
        block = torch.arange(gates.shape[-1], device=q.device)
        hidden = block >= own[:, None] if self.spec.pattern == Pattern.CAUSAL_SELF else block == own[:, None]
        if key_mask is not None:
            hidden = hidden | ~_blocks(key_mask, self.block_size).any(-1)[:, None, None, : gates.shape[-1]]
        return gates.masked_fill(hidden, -math.inf)

    def _retrieve(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        landmarks: Tensor,
        key_mask: Tensor | None,
        own: Tensor,
        start: int,
    ) -> Tensor:
        """The same over the own block [T] and the top_k others: a landmark's score in place of a log-sum-exp."""
        assert self.top_k is not None
        causal, size = self.spec.pattern == Pattern.CAUSAL_SELF, self.block_size
        gates, parts = self._gates(q, landmarks, own, key_mask), []
        if not self.spec.cross:
            near = Selection(own[None, None, :, None], size, causal=causal, start=start)
            parts.append(sparse_attention_lse(q, k, v, near, key_mask=key_mask))
        chosen = largest(gates, self.top_k)
        for rank in range(chosen.shape[-1]):
            blocks = chosen[..., rank : rank + 1]
            read = sparse_attention(q, k, v, Selection(blocks, size), key_mask=key_mask)
            gate = gates.gather(-1, blocks.clamp_min(0)).masked_fill(blocks < 0, -math.inf)
            parts.append((read, gate.squeeze(-1).transpose(1, 2)))
        return merge(parts)[0]

    def init_memory(self, batch_size: int, like: Tensor) -> LandmarkCache:
        cache = super().init_memory(batch_size, like)
        return LandmarkCache(
            k=cache.k, v=cache.v, landmarks=like.new_empty(batch_size, 0, self.spec.num_heads, self.key_dim)
        )

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> LandmarkCache:
        assert isinstance(state, LandmarkCache)
        cache = super().update(state, k, v, key_mask=key_mask)
        done = (
            state.k.shape[1] // self.block_size
        )  # in cross-attention the short last block has one, for the time being
        end = cache.k.shape[1] if self.spec.cross else cache.k.shape[1] // self.block_size * self.block_size
        fresh = slice(done * self.block_size, end)
        landmarks = state.landmarks[:, :done]
        if fresh.start < end:
            new = self.landmarks(cache.k[:, fresh], None if cache.mask is None else cache.mask[:, fresh], done)
            landmarks = torch.cat([landmarks, new], dim=1)
        return LandmarkCache(landmarks=landmarks, **{f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)})

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, LandmarkCache)
        return self._read(q, state.k, state.v, state.landmarks, state.mask, state.position - q.shape[1])

    def state_bytes(self, length: int) -> int:
        blocks = math.ceil(length / self.block_size) if self.spec.cross else length // self.block_size
        return super().state_bytes(length) + 4 * blocks * self.spec.num_heads * self.key_dim


def grouped_softmax(scores: Tensor, gates: Tensor, own: Tensor, visible: Tensor) -> Tensor:
    """Weights of keys in blocks: a softmax within each block, times the block's share in a softmax over blocks.

    The own block enters the latter with its log-sum-exp, as if its keys stood there one by one.

    Args:
        scores: [..., N, C, l], of N queries and C blocks of l keys.
        gates: [..., N, C], of the blocks' landmarks; -inf: not read.
        own: [N, C] bool, the block of the query, if any.
        visible: [..., N, C, l] bool, or broadcastable to it.

    Returns:
        [..., N, C, l], in at least float32; each query's sum to 1, or are zeros where nothing is visible.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    lowest = torch.finfo(wide).min
    scores = torch.where(visible, scores.to(wide), lowest)
    total = scores.logsumexp(-1)
    gates = torch.where(own, total, gates.to(wide))
    present = visible.any(-1) & (gates > -math.inf)
    share = gates.masked_fill(~present, lowest).log_softmax(-1).masked_fill(~present, lowest)
    return (scores - (total - share)[..., None]).exp()


def landmark_softmax(scores: Tensor, landmark: Tensor) -> Tensor:
    """The causal grouped softmax of a sequence that contains its landmarks: [..., L, L] weights from scores.

    Args:
        scores: [..., L, L], of queries and keys.
        landmark: [L] bool; the block of a position is the number of landmarks before it. Empty blocks weigh nothing.
    """
    position, token = torch.arange(len(landmark), device=landmark.device), ~landmark
    block = landmark.cumsum(0) - landmark.long()
    place = position - position.masked_fill(block == F.pad(block[:-1], (1, 0), value=-1), 0).cummax(0).values
    columns = position.new_full((int(block[-1]) + 1, int(place.max()) + 1), -1)
    columns[block[token], place[token]] = position[token]
    visible = (columns >= 0) & (columns <= position[:, None, None])
    own = block[:, None] == torch.arange(len(columns), device=landmark.device)
    gates = F.pad(scores[..., landmark], (0, len(columns) - int(landmark.sum())))
    gates = gates.masked_fill(block[:, None] <= torch.arange(len(columns), device=landmark.device), -math.inf)
    weights = grouped_softmax(scores[..., columns.clamp_min(0)], gates, own, visible)
    return torch.zeros_like(scores).index_copy(
        -1, position[token], weights[..., block[token], place[token]].to(scores.dtype)
    )


def _blocks(x: Tensor, size: int) -> Tensor:
    """[B, S, ...] -> [B, ceil(S / size), size, ...], zeros behind the end."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size))
