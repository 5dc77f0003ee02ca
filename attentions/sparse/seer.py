"""SeerAttention: a small gate learns to foresee which blocks of keys dense attention would weigh most."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State, repeat_heads, rotary
from attentions.dense.softmax import KVCache, Softmax
from attentions.linear._recurrence import wide
from attentions.sparse._compression import in_blocks
from attentions.sparse._selection import Selection, chosen, largest, sparse_attention
from attentions.sparse._teacher import dense_weights, visible_keys


@dataclass(kw_only=True)
class GateCache(KVCache):
    """All keys and values, the gate's key of each block, and the keys before rotation of a last, incomplete block.

    gates: [B, N, G, gate_dim], of the last block as far as it is written; tail: [B, < block_size, G, K].
    """

    gates: Tensor
    tail: Tensor


class SeerAttention(Softmax):
    """Softmax over the blocks of keys that a learned gate G = softmax(q_g k_g^T / sqrt(gate_dim)) chooses.

    The maximum, minimum and mean of a block's keys, before rotation and each over channels apart, go through a linear
    map per head to k_g, which is then rotated by the block's first position. Causal forms have a gate per query: the
    queries of the heads that share a key-value head go through one linear map to q_g, and these heads share their
    blocks. In self-attention the candidates are the complete blocks before the own one, which is always read. Noncausal
    forms have a gate per block of queries and head: q_g is their mean, every block of keys is a candidate, and in
    self-attention the own one is always read.

    The gate learns nothing from the task, nor the layer from the gate: in train mode dense attention of the same q and
    k, its maximum over each block (of keys, of a block's queries, of the heads that share a gate) and divided by the
    sum over the candidates, is the target of a Kullback-Leibler loss named `gate`, which stops at q and k.

    With gate_dim = D the gate has M D (1 + 3 G / H) parameters, 3 M D with pooled queries; softmax attention has
    2 M^2 (1 + G / H).

    Args:
        block_size: positions in a block.
        top_k: blocks of the largest gates, read beside the own one; threshold: every block whose gate is at least that
            (0: all). One of the two is None.
        gate_dim: width of q_g and k_g; None means that of a head, which leaves pooled queries without a linear map.
        gate_loss_scale: weight of the loss.
        dropout, bias: as in softmax attention.

    Source: Gao et al. 2024, https://arxiv.org/abs/2410.13276; sizes, the per-query gate (SeerAttention-R) and the loss
    from the authors' code, not confirmed from the paper's text. Differs: layer and gate are trained together from
    scratch, where the published gate is distilled from a trained model or fine-tuned with it; the loss leaves out the
    first quarter of the rows in causal self-attention, as that code does for gates per block of queries (its script for
    gates per query leaves out half), and rows without a candidate; the norms of q_g and k_g, an option of gates per
    query which that script turns on, are left out; the gate's maps start with variance 1 / inputs, which is wider;
    noncausal and cross forms are ours; a block counts with its unmasked positions; a gate equal to the threshold
    passes.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2410.13276"
    complexity = "T (S / block_size + top_k block_size)"
    selects = True
    full_budget = staticmethod(lambda length: {"block_size": 4, "top_k": length, "threshold": None})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_size: int = 64,
        top_k: int | None = None,
        threshold: float | None = 5e-4,
        gate_dim: int | None = None,
        gate_loss_scale: float = 10.0,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        for name, value in (("block_size", block_size), ("top_k", top_k), ("gate_dim", gate_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if (top_k is None) == (threshold is None):
            raise ValueError(f"one of top_k and threshold must be null, got {top_k} and {threshold}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
        self.gate_dim = gate_dim = gate_dim or self.key_dim
        if spec.rotary_base is not None and gate_dim % 2:
            raise ValueError(
                f"rotary positions need an even gate_dim, got {gate_dim}; nearest: {gate_dim - 1}, {gate_dim + 1}"
            )
        self.block_size, self.top_k, self.threshold = block_size, top_k, threshold
        self.gate_loss_scale = gate_loss_scale
        heads, groups = spec.num_heads, spec.kv_heads
        plain = self.pooled and gate_dim == self.key_dim  # one linear map on either side is enough

        def linear(count: int, inner: int) -> nn.Parameter:
            # a plain parameter: a backbone that shrinks the weights of every nn.Linear would make all gates alike
            return nn.Parameter(torch.randn(count, inner, gate_dim) / math.sqrt(inner))

        self.gate_k = linear(heads if plain else groups, 3 * self.key_dim)
        self.gate_q = (
            None
            if plain
            else linear(heads, self.key_dim)
            if self.pooled
            else linear(groups, heads // groups * self.key_dim)
        )

    @property
    def pooled(self) -> bool:
        """Whether a block of queries shares a gate."""
        return not self.spec.causal

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        return heads  # pooling comes before: `attend`, `update` and `read` rotate

    def _turn(self, heads: Tensor, start: int, stride: int = 1) -> Tensor:
        """Rotate [B, N, H, K], which stand at the positions start + n * stride, where the spec asks for it."""
        if self.spec.rotary_base is None or self.spec.cross:
            return heads
        return rotary(heads.repeat_interleave(stride, dim=1), base=self.spec.rotary_base, start=start)[:, ::stride]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        logits = self.gate(q, self.block_keys(k, key_mask), None if self.spec.cross else key_mask)
        candidates, own = self._candidates(logits, key_mask)
        q, k = self._turn(q, 0), self._turn(k, 0)
        if self.training:
            self.add_auxiliary(gate=self.gate_loss_scale * self._loss(q, k, logits, candidates, key_mask))
        dropout = self.dropout if self.training else 0.0
        return sparse_attention(q, k, v, self._select(logits, candidates, own), key_mask=key_mask, dropout=dropout)

    def block_keys(self, k: Tensor, key_mask: Tensor | None, start: int = 0) -> Tensor:
        """k_g [B, N, G or H, gate_dim] of keys before rotation [B, S, G, K] from position `start` on."""
        with torch.autocast(k.device.type, enabled=False):
            mask = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
            hidden = ~in_blocks(mask, self.block_size)[..., None, None]
            blocks = in_blocks(wide(k.detach()), self.block_size)
            parts = (
                blocks.masked_fill(hidden, -math.inf).amax(2),
                blocks.masked_fill(hidden, math.inf).amin(2),
                blocks.masked_fill(hidden, 0.0).sum(2) / (~hidden).sum(2).clamp_min(1),
            )
            pooled = torch.cat(parts, dim=-1).masked_fill(hidden.all(2), 0.0)
            heads = repeat_heads(pooled, self.gate_k.shape[0])
            return self._turn(_per_head(heads, self.gate_k), start, self.block_size)

    def gate(self, q: Tensor, block_keys: Tensor, query_mask: Tensor | None = None, start: int = 0) -> Tensor:
        """Logits [B, G or H, rows, N] of queries before rotation [B, T, H, K]; a row is a query or a block of them."""
        with torch.autocast(q.device.type, enabled=False):
            q = wide(q.detach())
            if self.pooled:
                mask = q.new_ones(q.shape[:2], dtype=torch.bool) if query_mask is None else query_mask
                total = in_blocks(q.masked_fill(~mask[..., None, None], 0.0), self.block_size).sum(2)
                q = total / in_blocks(mask, self.block_size).sum(2).clamp_min(1)[..., None, None]
            if self.gate_q is not None:
                q = _per_head(q.unflatten(2, (self.gate_q.shape[0], -1)).flatten(3), self.gate_q)
            q = self._turn(q, start, self.block_size if self.pooled else 1)
            keys = repeat_heads(block_keys, q.shape[2])
            return (q * self.gate_dim**-0.5).transpose(1, 2) @ keys.permute(0, 2, 3, 1)

    def _candidates(self, logits: Tensor, key_mask: Tensor | None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Blocks that the gate decides about and blocks always read: [B or 1, 1, rows, N] bool each."""
        block = torch.arange(logits.shape[3], device=logits.device)
        row = torch.arange(logits.shape[2], device=logits.device)[:, None]
        behind = (row if self.pooled else (start + row) // self.block_size) - block
        candidates = torch.ones_like(behind, dtype=torch.bool)[None, None]
        own = (behind == 0)[None, None] & (not self.spec.cross)
        if self.spec.causal and not self.spec.cross:
            candidates = candidates & (behind >= (0 if self.pooled else 1))
        if key_mask is not None:
            candidates = candidates & in_blocks(key_mask, self.block_size).any(-1)[:, None, None]
        return candidates, own

    def _select(self, logits: Tensor, candidates: Tensor, own: Tensor, start: int = 0) -> Selection:
        with torch.no_grad():
            gates = _log_gates(logits, candidates).masked_fill(~candidates, -math.inf).masked_fill(own, math.inf)
            if self.top_k is not None:
                blocks = largest(gates, self.top_k + (not self.spec.cross))
            else:
                assert self.threshold is not None
                read = (gates.exp() >= self.threshold) & (candidates | own)
                blocks = chosen(read, read.shape[-1])
        causal = self.spec.pattern == Pattern.CAUSAL_SELF
        return Selection(blocks, self.block_size, self.block_size if self.pooled else 1, causal=causal, start=start)

    def _loss(self, q: Tensor, k: Tensor, logits: Tensor, candidates: Tensor, key_mask: Tensor | None) -> Tensor:
        """KL(target, gates) of rotated q and k, a mean over the elements of all rows with a candidate."""
        target = self.target(q, k, key_mask, logits.shape[1]).masked_fill(~candidates, 0.0)
        target = target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
        divergence = F.kl_div(_log_gates(logits, candidates), target, reduction="none").sum(-1)
        counted = candidates.any(-1)
        if not self.spec.cross:
            if key_mask is not None:
                rows = in_blocks(key_mask, self.block_size).any(-1) if self.pooled else key_mask
                counted = counted & rows[:, None]
            if self.spec.causal:
                counted = counted & (torch.arange(logits.shape[2], device=q.device) >= logits.shape[2] // 4)
        counted = counted.expand_as(divergence)
        return divergence.masked_fill(~counted, 0.0).sum() / (counted.sum() * logits.shape[3]).clamp_min(1)

    def target(self, q: Tensor, k: Tensor, key_mask: Tensor | None, count: int) -> Tensor:
        """The largest weight of dense attention in each block, without gradient: [B, count, rows, N]."""
        causal = self.spec.causal and not self.spec.cross
        visible = visible_keys(q.shape[1], k.shape[1], causal=causal, key_mask=key_mask, device=q.device)
        if key_mask is not None and not self.spec.cross:
            visible = visible & key_mask[:, None, :, None]  # a masked query is nobody's
        weights = dense_weights(q, k, visible).unflatten(1, (count, -1)).amax(2)
        weights = F.pad(weights, (0, -weights.shape[-1] % self.block_size)).unflatten(-1, (-1, self.block_size))
        weights = weights.amax(-1)
        return in_blocks(weights.transpose(1, 2), self.block_size).amax(2).transpose(1, 2) if self.pooled else weights

    def init_memory(self, batch_size: int, like: Tensor) -> GateCache:
        cache = super().init_memory(batch_size, like)
        gates = wide(like.new_empty(batch_size, 0, self.gate_k.shape[0], self.gate_dim))
        return GateCache(k=cache.k, v=cache.v, gates=gates, tail=cache.k.clone())

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> GateCache:
        assert isinstance(state, GateCache)
        cache = super().update(state, self._turn(k, state.position), v, key_mask=key_mask)
        size, written = self.block_size, state.k.shape[1]
        complete, fresh = written // size, torch.cat([state.tail, k], dim=1)
        mask = None if cache.mask is None else cache.mask[:, complete * size :]
        gates = torch.cat([state.gates[:, :complete], self.block_keys(fresh, mask, complete * size)], dim=1)
        tail = fresh[:, fresh.shape[1] - cache.k.shape[1] % size :].clone()
        return GateCache(gates=gates, tail=tail, **{f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)})

    def state_bytes(self, length: int) -> int:
        gates = math.ceil(length / self.block_size) * self.gate_k.shape[0] * self.gate_dim
        tail = length % self.block_size * self.spec.kv_heads * self.key_dim
        return super().state_bytes(length) + 4 * (gates + tail)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, GateCache)
        start = 0 if self.spec.cross else state.position - q.shape[1]
        logits = self.gate(q, state.gates, start=start)
        selection = self._select(logits, *self._candidates(logits, state.mask, start), start)
        return sparse_attention(self._turn(q, start), state.k, state.v, selection, key_mask=state.mask)


class SeerAttentionPrefillOfficial(SeerAttention):
    """SeerAttention's published prefill: causal, with one gate per block of queries, all of which its mean mixes.

    Source: as SeerAttention. Differs: the authors' code reads the last two blocks of queries densely, which would let
    an output depend on where the sequence ends; here the gate decides about them, too. There it decides about the own
    block as well, which is always read here, since without any block an output would be undefined.
    """

    patterns = Pattern.CAUSAL_SELF
    impossible: ClassVar = {
        ~Pattern.CAUSAL_SELF: "published for causal self-attention; pooled queries elsewhere are noncausal `seer`",
    }
    leaks = "a query's blocks are chosen by the mean of its whole block of queries, later ones included"
    stepwise = "its gate needs a whole block of queries, of which a decoder has only seen the first"

    @property
    def pooled(self) -> bool:
        return True


def _log_gates(logits: Tensor, candidates: Tensor) -> Tensor:
    """log softmax over the candidates; of a row without one, no matter what."""
    return logits.masked_fill(~candidates, torch.finfo(logits.dtype).min).log_softmax(-1)


def _per_head(heads: Tensor, weight: Tensor) -> Tensor:
    """[B, N, H, I] and [H, I, O] -> [B, N, H, O]."""
    return torch.einsum("bnhi,hio->bnho", heads, wide(weight))
