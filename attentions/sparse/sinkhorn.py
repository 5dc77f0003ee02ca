"""Sparse Sinkhorn attention."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State
from attentions.dense.softmax import KVCache, Softmax
from attentions.linear._recurrence import wide
from attentions.lowrank._blocks import masked_softmax, segments

HIDDEN = -1e9  # log of a share that is none


class Sinkhorn(Softmax):
    """Each block of queries reads its own block of keys and one that a learned, soft permutation brings there.

    R_i = (mean of the keys in block i) W_R, one score per block of the sequence; S = the Sinkhorn balance of
    (R + Gumbel noise in training) / temperature: columns and rows of exp are normalised in turn, rows last, so that
    S is close to doubly stochastic. Position p of the block brought to i is sum_j S_ij k_jp over the blocks j that have
    a position p (S_ij shared among these), values alike; one softmax over both blocks.

    Causal: block i may receive blocks j < i only. The mean runs over all keys up to the first of block i, and a column
    is normalised over the rows up to i: a later block never changes how earlier ones were balanced.

    Column j of W_R belongs to block j, so sequences are at most spec.max_keys long, and columns of blocks that training
    never reached keep their initial values. 4 M^2 + D n / block_size parameters. Any earlier block may be asked for
    again: the state is softmax's cache, and each step balances all blocks anew.

    Args:
        block_size: positions of a block.
        temperature: divides the scores.
        num_iterations: of the balance.
        dropout, bias: as in softmax attention.

    Source: Tay et al. 2020, https://arxiv.org/abs/2002.11296, section 3; one linear map from the keys of a head, shared
    by the heads, as in the authors' code for LRA; one softmax over both blocks, temperature and iterations as in
    https://github.com/lucidrains/sinkhorn-transformer. Differs: LRA's code adds the outputs of two softmaxes, sums
    where there are means here, ends with columns, adds no noise and by default takes a softmax of R instead of its
    balance; causal columns stop at row i, since whole ones would show earlier outputs the future (LRA's code marks its
    causal balance as unverified); no ReLU on R, and no bias, which the columns would cancel. SortCut, by which all
    queries read the first sorted blocks, is left out.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {
        Pattern.CROSS: "queries read what is sorted to their own block, and a context's blocks are none of theirs"
    }
    paper = "https://arxiv.org/abs/2002.11296"
    complexity = "T block_size + T^2 / block_size"
    full_budget = staticmethod(lambda length: {"block_size": length})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_size: int = 50,
        temperature: float = 0.75,
        num_iterations: int = 7,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        for name, value in (("block_size", block_size), ("num_iterations", num_iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.block_size, self.temperature, self.num_iterations = block_size, temperature, num_iterations
        num_blocks = math.ceil(spec.max_keys / block_size)
        self.sort_weight = nn.Parameter(self.key_dim**-0.5 * torch.randn(self.key_dim, num_blocks))  # W_R

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            keys, values, known = self._blocks(k, v, key_mask)
            own = known[:, None, :, None].expand(-1, -1, -1, known.shape[2], -1)  # [B, 1, N, query, key]
            queries = segments(wide(q).transpose(1, 2), own.shape[-1])
            heads = self._mix(queries, keys, values, own.tril() if self.spec.causal else own, known)
            return heads.flatten(2, 3)[:, :, : q.shape[1]].transpose(1, 2).to(q.dtype)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        with torch.autocast(q.device.type, enabled=False):
            keys, values, known = self._blocks(state.k, state.v, state.mask)
            heads = self._mix(wide(q).transpose(1, 2)[:, :, None], keys, values, known[:, None, -1:, None], known)
            return heads[:, :, 0].transpose(1, 2).to(q.dtype)

    def _blocks(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, G, N, C, D], zero where unknown, and which positions are known [B, N, C]."""
        known = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        size = min(self.block_size, k.shape[1])
        if (count := math.ceil(k.shape[1] / size)) > self.sort_weight.shape[1]:
            raise ValueError(f"at most {self.sort_weight.shape[1]} blocks can be sorted, got {count}: raise max_length")
        keys, values = (
            segments(wide(x).masked_fill(~known[..., None, None], 0.0).transpose(1, 2), size) for x in (k, v)
        )
        return keys, values, segments(known[..., None], size)[..., 0]

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, own_seen: Tensor, known: Tensor) -> Tensor:
        """The last blocks of queries q [B, H, N or 1, C, D] read their own block and what is sorted there."""
        last = slice(k.shape[2] - q.shape[2], None)
        shares, allowed = (x[:, :, last] for x in self._permutation(k, known))
        present = known.to(k.dtype)[:, None]
        total = shares @ present  # [B, G, N, C]
        arrived = (allowed.to(k.dtype) @ present > 0)[:, :, :, None]
        both = []
        for x in (k, v):
            brought = (shares @ x.flatten(3)).unflatten(3, x.shape[3:]) / total.clamp_min(1e-12)[..., None]
            both.append(torch.cat([brought, x[:, :, last]], dim=3))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in both)
        seen = torch.cat([arrived.expand(-1, -1, -1, q.shape[3], -1), own_seen], dim=-1)
        weights = masked_softmax(q @ keys.mT * self.key_dim**-0.5, seen)
        return F.dropout(weights, self.dropout, self.training) @ values

    def _permutation(self, k: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Shares S of block j in what is brought to block i [B, G, N, N], and which may be positive [B, 1, N, N]."""
        count = k.shape[2]
        blocks = known.any(-1)
        if self.spec.causal:  # up to the first position of each block
            past = torch.ones(count, count, dtype=torch.bool, device=k.device).tril(-1)
            allowed = blocks[:, None, None] & past
            total = F.pad(k.sum(3), (0, 0, 1, -1)).cumsum(2) + k[:, :, :, 0]
            number = F.pad(known.sum(-1), (1, -1)).cumsum(1) + known[..., 0]
        else:
            allowed = blocks[:, None, None] & blocks[:, None, :, None]
            total, number = k.sum(3), known.sum(-1)
        mean = total / number.clamp(min=1)[:, None, :, None]
        scores = mean @ wide(self.sort_weight)[:, :count]
        if self.training:  # Gumbel noise
            scores = scores - torch.empty_like(scores).exponential_().clamp_min(1e-20).log()
        scores = (scores / self.temperature).masked_fill(~allowed, HIDDEN)
        return balance(scores, allowed, self.num_iterations, causal=self.spec.causal).exp(), allowed


def balance(scores: Tensor, allowed: Tensor, num_iterations: int, *, causal: bool) -> Tensor:
    """Log shares [..., N, N]: columns, then rows of exp(scores) are normalised over what is allowed, in turn."""
    for _ in range(num_iterations):
        column = scores.logcumsumexp(-2) if causal else scores.logsumexp(-2, keepdim=True)
        scores = (scores - column).masked_fill(~allowed, HIDDEN)
        scores = (scores - scores.logsumexp(-1, keepdim=True)).masked_fill(~allowed, HIDDEN)
    return scores
