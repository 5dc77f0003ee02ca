"""Reformer's LSH attention: tokens of one hash bucket read each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State, repeat_heads, rotary
from attentions.sparse._selection import masked_logsumexp, masked_softmax, merge


@dataclass(kw_only=True)
class Hashed(State):
    """Keys [B, S, H, K], values [B, S, G, V] and buckets [B, S, H, R] int32 of all positions."""

    k: Tensor
    v: Tensor
    buckets: Tensor


class Reformer(Attention):
    """Queries are their own keys, and each reads the keys that hash to its bucket in any of R rounds.

        k_j = q_j / |q_j|     h_r(x) = argmax [x R_r; -x R_r], R_r [K, b / 2] random     P_i = union over r of P_i^r
        o_i = sum_j softmax_j(q_i.k_j) v_j over j in P_i, j != i;  v_i where P_i holds nothing else

    In each round positions are sorted by (bucket, position) and cut into chunks of m:

        noncausal, as published:  P_i^r = {j in i's bucket, in i's chunk or the one before}
        causal:                   P_i^r = {the m latest positions before i in i's bucket}

    The published causal form masks the future inside chunks; but chunks are cut from the sort of all positions, so
    later tokens decide which earlier ones share a chunk: it looks ahead. The causal form here does not, at the same
    cost, and decodes from all keys and values and R buckets each. Rounds are merged by their log-sum-exps, and a pair
    that n rounds have counts 1 / n in each: together they are one softmax over P_i, as in the paper,
    and up to 2 m R positions it is computed as such, under a mask.

    b = 2 max_length / m, rounded up to even: buckets depend on the slot, never on the length at hand. Masked keys
    fall in a bucket behind all others. Rotations are new in each training step; in eval mode the state dict's.
    One projection for q and k: 3 M^2 parameters where softmax attention has 4 M^2. Grouped heads share values only.

    Args:
        chunk_size: m, twice the mean bucket size at max_length.
        num_hashes: rounds R.
        dropout: probability of dropping an attention weight in training.

    Source: Kitaev et al. 2020, https://arxiv.org/abs/2001.04451, section 2 and appendix A; scores as in the authors'
    code, q_i.k_j without 1 / sqrt(K). Differs: the causal form; n counts the rounds in which i reads j, where the
    paper counts equal buckets even if a chunk parts them. Trax's second implementation lets the first chunk look back
    at the last, reads across buckets within a chunk and counts a pair once per round.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "queries are their own keys, which takes one sequence"}
    paper = "https://arxiv.org/abs/2001.04451"
    complexity = "T min(T, num_hashes chunk_size) + T num_hashes max_length / chunk_size"
    selects = True

    rotations: Tensor  # [H, K, R, b / 2]

    def __init__(self, spec: LayerSpec, *, chunk_size: int, num_hashes: int = 8, dropout: float = 0.0):
        super().__init__(spec)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if num_hashes < 1:
            raise ValueError(f"num_hashes must be at least 1, got {num_hashes}")
        self.chunk_size, self.num_hashes, self.dropout = chunk_size, num_hashes, dropout
        self.qk_proj = nn.Linear(spec.dim, spec.dim, bias=False)
        self.v_proj = nn.Linear(spec.dim, spec.kv_heads * spec.head_dim, bias=False)
        self.out_proj = nn.Linear(spec.dim, spec.dim, bias=False)
        half = math.ceil(spec.max_length / chunk_size)
        self.register_buffer("rotations", torch.randn(spec.num_heads, spec.head_dim, num_hashes, half))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        return self._attend(*self._heads(x), real)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Hashed:
        like, (heads, groups, width) = self.v_proj.weight, (self.spec.num_heads, self.spec.kv_heads, self.spec.head_dim)
        return Hashed(
            k=like.new_empty(batch_size, 0, heads, width),
            v=like.new_empty(batch_size, 0, groups, width),
            buckets=like.new_empty(batch_size, 0, heads, self.num_hashes, dtype=torch.int32),
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, Hashed]:
        assert isinstance(state, Hashed)
        q, k, v, buckets = self._heads(x, state.position)
        state = Hashed(
            k=torch.cat([state.k, k], dim=1),
            v=torch.cat([state.v, v], dim=1),
            buckets=torch.cat([state.buckets, buckets], dim=1),
            position=state.position + 1,
        )
        # the same bucket, and at most m of it from j to before i
        same = (state.buckets == state.buckets[:, -1:])[:, :-1]
        recent = same.flip(1).cumsum(1).flip(1) <= self.chunk_size
        visible = (same & recent).any(-1).transpose(1, 2)  # [B, H, S]
        scores = (state.k[:, :-1].transpose(1, 2) @ q.transpose(1, 2).mT).squeeze(-1)
        weights = masked_softmax(scores, visible).to(q.dtype)
        values = repeat_heads(state.v, self.spec.num_heads).transpose(1, 2)
        read = (weights[:, :, None] @ values[:, :, :-1])[:, :, 0]
        read = torch.where(visible.any(-1, keepdim=True), read, values[:, :, -1])
        return self.out_proj(read.flatten(1))[:, None], state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Hashed]:
        q, k, v, buckets = self._heads(x)
        output = self._attend(q, k, v, buckets, x.new_ones(x.shape[:2], dtype=torch.bool))
        return output, Hashed(k=k, v=v, buckets=buckets, position=x.shape[1])

    def state_bytes(self, length: int) -> int:
        heads, groups, width = self.spec.num_heads, self.spec.kv_heads, self.spec.head_dim
        return 4 * length * (heads * (width + self.num_hashes) + groups * width)

    def _heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k [B, T, H, K], v [B, T, G, V], buckets [B, T, H, R] int32."""
        v = self.v_proj(x).unflatten(-1, (self.spec.kv_heads, -1))
        wide = torch.promote_types(x.dtype, torch.float32)  # a rounded direction falls in another bucket
        with torch.autocast(x.device.type, enabled=False):
            q = F.linear(x.to(wide), self.qk_proj.weight.to(wide)).unflatten(-1, (self.spec.num_heads, -1))
            if self.spec.rotary_base is not None:
                q = rotary(q, base=self.spec.rotary_base, start=start)
            k = F.normalize(q, dim=-1)
            with torch.no_grad():
                rotations = torch.randn_like(self.rotations) if self.training else self.rotations
                turned = torch.einsum("bthk,hkrn->bthrn", k, rotations.to(wide))
                buckets = torch.cat([turned, -turned], dim=-1).argmax(-1).int()
        return q.to(v.dtype), k.to(v.dtype), v, buckets

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, real: Tensor) -> Tensor:
        """All positions at once; real [B, T] bool, False where masked; returns [B, T, M]."""
        length, size = q.shape[1], min(self.chunk_size, q.shape[1])
        padding = -length % size
        v = repeat_heads(v, self.spec.num_heads)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, K]
        real = F.pad(real, (0, padding))[:, None].expand(v.shape[:3])
        buckets = F.pad(buckets, (0, 0, 0, 0, 0, padding)).permute(0, 2, 3, 1).long()  # [B, H, R, T]
        buckets = buckets.masked_fill(~real[:, :, None], 2 * self.rotations.shape[-1])
        order = buckets.sort(dim=-1, stable=True).indices
        place = order.argsort(dim=-1)
        place_or_chunk = place if self.spec.causal else place // size
        codes = buckets * (2 * max(self.chunk_size, length + padding) + 2) + place_or_chunk  # see _reads
        if length <= 2 * self.chunk_size * self.num_hashes:  # all scores are fewer than those of all rounds
            heads, found = self._masked(q, k, v, codes, real)
        else:
            heads, found = self._chunked(q, k, v, codes, real, order, place)
        alone = F.dropout(real.to(v.dtype), self.dropout, self.training)[..., None] * v.masked_fill(~real[..., None], 0)
        heads = torch.where(found[..., None], heads, alone)
        return self.out_proj(heads.transpose(1, 2)[:, :length].flatten(2))

    def _reads(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether i reads j in a round, by one number for each: the bucket, then the place (noncausal: the chunk)."""
        ahead = i[..., None] - j[..., None, :]
        return (ahead >= 1) & (ahead <= self.chunk_size) if self.spec.causal else (ahead >= 0) & (ahead <= 1)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, codes: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """One softmax over the union of the rounds; heads [B, H, T, V], and whether anything was read [B, H, T]."""
        visible = self._reads(codes[:, :, 0], codes[:, :, 0])
        for turn in range(1, self.num_hashes):
            visible = visible | self._reads(codes[:, :, turn], codes[:, :, turn])
        visible = visible & real[:, :, None] & ~torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        weights = F.dropout(masked_softmax(q @ k.mT, visible), self.dropout, self.training)
        return weights.to(v.dtype) @ v, visible.any(-1)

    def _chunked(
        self, q: Tensor, k: Tensor, v: Tensor, codes: Tensor, real: Tensor, order: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same, round by round, each chunk against itself and the one before."""
        size = self.chunk_size

        def picked(x: Tensor, at: Tensor) -> Tensor:
            return x.gather(2, at[..., None].expand(*at.shape, x.shape[-1]))

        def around(x: Tensor) -> Tensor:  # the chunk before, and the own one
            return torch.cat([torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], dim=2), x], dim=3)

        itself = torch.eye(2 * size, dtype=torch.bool, device=q.device)[size:]  # [m, 2 m]
        rounds = []
        for turn in range(self.num_hashes):
            every = (q, k, v, codes.transpose(2, 3), real[..., None])
            query, key, value, code, here = (picked(x, order[:, :, turn]).unflatten(2, (-1, size)) for x in every)
            there = around(code)
            reads = [self._reads(code[..., other], there[..., other]) for other in range(self.num_hashes)]
            visible = reads[turn] & around(here).mT & ~itself
            scores = query @ around(key).mT
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            scores = scores - sum(reads, scores.new_zeros(())).clamp_min(1).log()  # rounds in which i reads j
            weights = F.dropout(masked_softmax(scores, visible), self.dropout, self.training).to(v.dtype)
            parts = (weights @ around(value), masked_logsumexp(scores, visible)[..., None])
            heads, total = (picked(x.flatten(2, 3), place[:, :, turn]) for x in parts)
            rounds.append((heads, total.squeeze(-1)))
        heads, total = merge(rounds)
        return heads, total > -math.inf
