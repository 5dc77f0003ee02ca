"""HyperAttention: keys sorted by a hash, one block of them exactly, and a uniform sample for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State, UnsupportedPattern, repeat_heads
from attentions.dense.softmax import KVCache, Softmax
from attentions.sparse._selection import (
    Selection,
    masked_logsumexp,
    masked_softmax,
    merge,
    sparse_attention_lse,
)

Part = tuple[Tensor, Tensor]  # heads [B, T, H, V] and their log-sum-exps [B, T, H]


@dataclass(kw_only=True)
class SortedCache(KVCache):
    """Keys [B, S, G, K], values [B, S, G, V] and hashes [B, S, G] int32, by hash within each interval of `_intervals`.

    In cross-attention by hash altogether; masked keys have the hash 2^r and stand behind all others.
    """

    hashes: Tensor


class HyperAttention(Softmax):
    """Softmax with a denominator of b + m terms for each query, of which the m stand for all keys but the b.

        hash(x) = rank in Gray order of the signs of x P, P [K, r]: neighbouring ranks differ in one sign
        near: keys are sorted by hash and cut into blocks of b; a query reads one block exactly
        far:  m keys, drawn uniformly with replacement, each weighed M / m of M keys; those of the own block not at all
        output: the two merged by their log-sum-exps (the estimate of the denominator is unbiased)

    Which block: noncausal, queries are sorted by hash, too, and cut into as many blocks as there are of keys. Causal,
    the published way of doing so lets the place of a query depend on later ones; here a query reads the block that its
    own hash falls into: the middle of the keys with its hash, or where they would be. Short sequences are exact.

    Causal self-attention halves: the second half reads the first as above and both halves are causal attention again,
    down to min_seq_len = n positions, which are exact. Halves are those of n 2^l positions from the start, so that
    whatever comes later moves no border: position t reads, for each power of two in t // n, that interval of n 2^l
    keys, then its own n. Decoding is the same, step by step; the cache holds keys sorted within these intervals.

    Samples are drawn anew in every forward of training. In evaluation their ranks among the sorted keys are fixed
    numbers of the state dict, one set for each key-value head, scaled to the number of keys.

    Args:
        block_size: keys b in a block.
        num_samples: m.
        num_hash_bits: r.
        min_seq_len: fewer keys than this are read exactly; causal self-attention: up to as many positions.
        dropout, bias: as in softmax attention.

    Source: Han et al. 2023, https://arxiv.org/abs/2310.05869, after the authors' code (section and algorithm numbers
    not confirmed from the paper's text), with its defaults 256, 256, 7 and 4096.
    Differs: the causal choice of a block. The code halves each length evenly, hence with other borders unless the
    length is min_seq_len 2^l; it shares samples in no heads, here a group of query heads has the same. In cross-
    attention it counts queries, not keys, for min_seq_len. Five quirks of the code are not followed: its hash takes
    Gray's code for its inverse (consecutive buckets then differ in up to four signs); its paths for CUDA and
    for float32 count samples of the own block twice; keys that pad the last block are read; the bfloat16 path cuts the
    gradient of the log-sum-exp; the place of a query depends on later ones. `HyperAttentionOfficial` has the first two
    and the last.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2310.05869"
    complexity = "T (block_size + num_samples + log S); causal self: times log (T / min_seq_len), plus T min_seq_len"
    selects = True
    full_budget = staticmethod(lambda length: {"min_seq_len": length + 1})

    directions: Tensor  # P [K, r]
    draws: Tensor  # [G, m] int32, in 0 ... 2^31 - 1

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_size: int = 256,
        num_samples: int = 256,
        num_hash_bits: int = 7,
        min_seq_len: int = 4096,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        for name, value in (
            ("block_size", block_size),
            ("num_samples", num_samples),
            ("num_hash_bits", num_hash_bits),
            ("min_seq_len", min_seq_len),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_hash_bits > 30:
            raise ValueError(f"num_hash_bits must be at most 30, got {num_hash_bits}")
        self.block_size, self.num_samples, self.num_hash_bits = block_size, num_samples, num_hash_bits
        self.min_seq_len = min_seq_len
        self.register_buffer("directions", torch.randn(self.key_dim, num_hash_bits))
        # whole numbers: a bf16 module would round random reals to ties
        self.register_buffer("draws", torch.randint(2**31, (spec.kv_heads, num_samples)).int())

    # -- all positions at once --------------------------------------------------------------------

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        """[B, T, H, K] in at least float32: a rounded direction has another hash."""
        return self._rotate(_wide(self.q_proj, x).unflatten(-1, (self.spec.num_heads, -1)), start)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys [B, S, G, K], in at least float32, too, and values [B, S, G, V]."""
        v = self.v_proj(source).unflatten(-1, (self.spec.kv_heads, -1))
        return self._rotate(_wide(self.k_proj, source).unflatten(-1, (self.spec.kv_heads, -1)), start), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        causal, length = self.spec.pattern == Pattern.CAUSAL_SELF, k.shape[1]
        if length < self.min_seq_len or (causal and length == self.min_seq_len):
            return super().attend(q.to(v.dtype), k.to(v.dtype), v, key_mask=key_mask)
        own, hashes = self.hashes(q, None if self.spec.cross else key_mask), self.hashes(k, key_mask)
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self._halves(q, own, k, v, hashes) if causal else self._approximate(q, own, *_sorted(k, v, hashes))[0]

    def _halves(self, q: Tensor, own: Tensor, k: Tensor, v: Tensor, hashes: Tensor) -> Tensor:
        """Causal: exact within the own min_seq_len positions, and one interval of each doubling of it before them."""
        batch, length, size = *q.shape[:2], self.min_seq_len
        leaves = (_cut(x, -(-length // size), size).flatten(0, 1) for x in (q, k, v, self._real(hashes)))
        exact = self._exact(*leaves)
        parts = [(_joined(exact[0], batch, length), _joined(exact[1], batch, length))]
        while size < length:
            pairs = -(-(length - size) // (2 * size))  # of halves of which the later one has begun
            earlier = [_cut(x, 2 * pairs, size)[:, ::2].flatten(0, 1) for x in (k, v, hashes)]
            later = _cut(q, 2 * pairs, size)[:, 1::2].flatten(0, 1)
            asked = _cut(own, 2 * pairs, size, 2**self.num_hash_bits)[:, 1::2].flatten(0, 1)
            heads, total = self._approximate(later, asked, *_sorted(*earlier))
            parts.append((_spread(heads, batch, length, 0.0), _spread(total, batch, length, -math.inf)))
            size *= 2
        return merge(parts)[0]

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Part:
        """The latest T of S positions, causal."""
        every = Selection(
            torch.zeros(1, 1, 1, 1, dtype=torch.long, device=q.device),
            k.shape[1],
            q.shape[1],
            causal=True,
            start=k.shape[1] - q.shape[1],
        )
        return sparse_attention_lse(q, k, v, every, key_mask=real, dropout=self._dropout)

    def hashes(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rank in Gray order of the signs of x P: [B, S, H, K] -> [B, S, H] int32; 2^r where masked."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            signs = (x @ self.directions.to(x.dtype)) > 0
            rank = self._rank((signs << torch.arange(self.num_hash_bits, device=x.device)).sum(-1)).int()
        return rank if mask is None else rank.masked_fill(~mask[..., None], 2**self.num_hash_bits)

    def _real(self, hashes: Tensor) -> Tensor:
        """Positions that are not masked: [B, S] bool."""
        return hashes[:, :, 0] < 2**self.num_hash_bits

    def _rank(self, code: Tensor) -> Tensor:
        """Where a code stands in Gray's sequence."""
        for shift in (1, 2, 4, 8, 16):
            code = code ^ (code >> shift)
        return code

    def _approximate(self, q: Tensor, own: Tensor, k: Tensor, v: Tensor, hashes: Tensor) -> Part:
        """One block and a sample of sorted keys; `own` [B, T, H] are the hashes of the queries."""
        real = self._real(hashes)
        count = real.sum(1)  # M of each row
        last = ((count - 1).clamp_min(0) // self.block_size)[:, None, None]
        block = self._block(own.transpose(1, 2), hashes.transpose(1, 2), last).minimum(last)
        near = Selection(block[..., None], self.block_size)
        parts = [sparse_attention_lse(q, k, v, near, key_mask=real, dropout=self._dropout)]
        if k.shape[1] > self.block_size:
            parts.append(self._sample(q, k, v, block, count))
        return merge(parts)

    def _block(self, own: Tensor, hashes: Tensor, last: Tensor) -> Tensor:
        """The block of sorted keys that each query reads: own [B, H, T], hashes [B, G, S], last [B, 1, 1]."""
        if not self.spec.causal:
            return self._by_rank(own, last)
        groups = own.unflatten(1, (hashes.shape[1], -1)).flatten(2).contiguous()
        low, high = (torch.searchsorted(hashes.contiguous(), groups, right=right) for right in (False, True))
        return ((low + high) // 2).view_as(own) // self.block_size

    def _by_rank(self, own: Tensor, last: Tensor) -> Tensor:
        """As many sorted queries to a block as there are for each."""
        asking = (own[:, :1] < 2**self.num_hash_bits).sum(-1, keepdim=True)
        width = -(-asking // (last + 1))
        return own.argsort(dim=-1, stable=True).argsort(dim=-1) // width.clamp_min(1)

    def _sample(self, q: Tensor, k: Tensor, v: Tensor, block: Tensor, count: Tensor) -> Part:
        """m of the sorted keys in place of all of them outside of the query's block [B, H, T]."""
        batch, _, groups, _ = k.shape
        draws = self.draws.expand(batch, -1, -1).long()
        if self.training:
            draws = torch.randint(2**31, draws.shape, device=q.device)
        ranks = (draws * count[:, None, None]) >> 31  # [B, G, m]
        keys, values = (
            repeat_heads(x.gather(1, ranks.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1])), q.shape[2])
            for x in (k, v)
        )
        scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ keys.permute(0, 2, 3, 1)  # [B, H, T, m]
        visible = self._counted(ranks.repeat_interleave(q.shape[2] // groups, dim=1)[:, :, None], block[..., None])
        visible = visible & (count > 0)[:, None, None, None]
        weights = F.dropout(masked_softmax(scores, visible), self._dropout).to(v.dtype)
        heads, total = (weights @ values.transpose(1, 2)).transpose(1, 2), masked_logsumexp(scores, visible)
        factor = (count.clamp_min(1).to(total.dtype) / self.num_samples).log()
        return heads, (total + factor[:, None, None]).transpose(1, 2)

    def _counted(self, ranks: Tensor, block: Tensor) -> Tensor:
        """Whether a sample [B, H, 1, m] counts for a query [B, H, T, 1]: not in the block that is read anyway."""
        return ranks // self.block_size != block

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    # -- step by step -----------------------------------------------------------------------------

    def init_memory(self, batch_size: int, like: Tensor) -> SortedCache:
        shape = batch_size, 0, self.spec.kv_heads
        k, v = like.new_empty(*shape, self.key_dim), like.new_empty(*shape, self.value_dim)
        return SortedCache(k=k, v=v, hashes=like.new_empty(shape, dtype=torch.int32))

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> SortedCache:
        assert isinstance(state, SortedCache)
        new = (k.to(v.dtype), v, self.hashes(k, key_mask))
        cache = [torch.cat(pair, dim=1) for pair in zip((state.k, state.v, state.hashes), new, strict=True)]
        position = state.position + k.shape[1]
        for first, last in self._intervals(position):
            if self.spec.cross or (first, last) not in self._intervals(state.position):
                done = _sorted(*(x[:, first:last] for x in cache))
                cache = [torch.cat([x[:, :first], y, x[:, last:]], dim=1) for x, y in zip(cache, done, strict=True)]
        return SortedCache(k=cache[0], v=cache[1], hashes=cache[2], position=position)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, SortedCache)
        cache, own, q = (state.k, state.v, state.hashes), self.hashes(q), q.to(state.v.dtype)
        if self.spec.cross and state.position < self.min_seq_len:
            return self._sdpa(q, state.k, state.v, self._real(state.hashes)[:, None, None], False)
        parts, start = [], 0
        for interval in self._intervals(state.position):
            parts.append(self._approximate(q, own, *(x[:, slice(*interval)] for x in cache)))
            start = interval[1]
        if not self.spec.cross:
            parts.append(self._exact(q, *(x[:, start:] for x in (state.k, state.v, self._real(state.hashes)))))
        return merge(parts)[0]

    def _intervals(self, position: int) -> list[tuple[int, int]]:
        """What the query at position - 1 reads by hash: of min_seq_len 2^l keys each; in cross-attention all keys."""
        if self.spec.cross:
            return [(0, position)]
        leaves, found, start = max(position - 1, 0) // self.min_seq_len, [], 0
        for level in reversed(range(leaves.bit_length())):
            if leaves >> level & 1:
                found.append((start, start + (self.min_seq_len << level)))
                start = found[-1][1]
        return found

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) + 4 * length * self.spec.kv_heads


class HyperAttentionOfficial(HyperAttention):
    """HyperAttention as its authors' code runs on CUDA: causal attention sorts queries, too, and so looks ahead.

    Three of the code's quirks: the place of a causal query depends on later queries, the hash of a code is Gray's code
    where its inverse is meant, and samples of a query's own block are counted twice.

    Source: as HyperAttention. Differs: halves of min_seq_len 2^l positions; keys that pad the last block are masked
    and the log-sum-exp keeps its gradient.
    """

    leaks = "a query's block is its rank in the sort of all queries, later ones included"
    stepwise = "its blocks need the sort of all queries, of which a decoder has only seen the first"

    def _rank(self, code: Tensor) -> Tensor:
        return code ^ (code >> 1)

    def _block(self, own: Tensor, hashes: Tensor, last: Tensor) -> Tensor:
        return self._by_rank(own, last)

    def _counted(self, ranks: Tensor, block: Tensor) -> Tensor:
        return torch.ones_like(ranks, dtype=torch.bool)

    def init_memory(self, batch_size: int, like: Tensor) -> SortedCache:
        raise UnsupportedPattern(f"HyperAttentionOfficial has no decode state: {self.stepwise}")


def _sorted(k: Tensor, v: Tensor, hashes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, S, G, K], values and hashes [B, S, G] by hash, in their order among equals."""
    hashes, order = hashes.sort(dim=1, stable=True)
    k, v = (x.gather(1, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return k, v, hashes


def _wide(projection: nn.Linear, x: Tensor) -> Tensor:
    """The projection in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if projection.bias is None else projection.bias.to(dtype)
        return F.linear(x.to(dtype), projection.weight.to(dtype), bias)


def _cut(x: Tensor, count: int, size: int, empty: int = 0) -> Tensor:
    """[B, S, ...] -> [B, count, size, ...]: a longer x ends there, a shorter one goes on with `empty`."""
    rest = (0, 0) * (x.dim() - 2) + (0, count * size - x.shape[1])
    return F.pad(x, rest, value=empty).unflatten(1, (count, size))


def _joined(x: Tensor, batch: int, length: int, empty: float = 0.0) -> Tensor:
    """[B n, size, ...] -> [B, length, ...], where n size falls short with `empty`."""
    x = x.unflatten(0, (batch, -1)).flatten(1, 2)
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, length - x.shape[1]), value=empty)


def _spread(x: Tensor, batch: int, length: int, empty: float) -> Tensor:
    """What later halves [B pairs, size, ...] read, with `empty` for the earlier halves: [B, length, ...]."""
    return _joined(torch.stack([torch.full_like(x, empty), x], dim=1).flatten(0, 1), batch, length, empty)
