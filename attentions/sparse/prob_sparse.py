"""Informer's ProbSparse attention: full attention for the queries whose attention is least uniform."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, QKVAttention, repeat_heads
from attentions.sparse._selection import masked_softmax


class ProbSparse(QKVAttention):
    """The u most active queries of each head read every key, the lazy others the mean of all values.

        M(q) = max_j s_j - mean_j s_j,  s_j = q.k_j / sqrt(K),  over U = factor ceil(ln S) sampled keys
        u = factor ceil(ln T);  ln counts as 1 at least, and U, u as S, T at most

    The sample is one for all queries, heads and rows: new in each training step; in eval mode the first U keys of a
    random order in the state dict. Masked keys are neither sampled nor counted in S and the mean; in self-attention
    masked positions are not counted in T and are never active. With u = T it is softmax attention.

    Args:
        factor: c, keys sampled and queries kept per unit of the logarithm.
        dropout: probability of dropping an attention weight of an active query in training.
        bias: bias on the projections.

    Raises:
        ValueError: from forward, when there are more keys than `spec.max_keys`, the length of the random order.

    Source: Zhou et al. 2020 (Informer), https://arxiv.org/abs/2012.07436, section 3.1 and algorithm 1.
    Differs: the authors' code samples keys per query, with repeats, and divides the sum over the sample by S; it takes
    ln 1 = 0, so that a single query is always lazy, and drops no weights. Their causal variant is not here: a query is
    active by comparison with all others, later ones included.
    """

    patterns = Pattern.NONCAUSAL_SELF | Pattern.NONCAUSAL_CROSS
    impossible: ClassVar = {
        Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS: "the top u of all queries depend on later queries"
    }
    paper = "https://arxiv.org/abs/2012.07436"
    complexity = "T ln S + S ln T"
    selects = True
    full_budget = staticmethod(lambda length: {"factor": length})

    rank: Tensor  # [max_keys] int64: places of the keys in a random order

    def __init__(self, spec: LayerSpec, *, factor: int = 5, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, bias=bias)
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor, self.dropout = factor, dropout
        self.register_buffer("rank", torch.randperm(spec.max_keys))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        num_queries, num_keys = q.shape[1], k.shape[1]
        if num_keys > len(self.rank):
            raise ValueError(f"at most {len(self.rank)} keys, the slot's max_length, got {num_keys}")
        real = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        asking = real if not self.spec.cross else real.new_ones(q.shape[:2])
        q, k, v = (repeat_heads(x, self.spec.num_heads).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))

        activity = self._activity(q.detach(), k.detach(), real).masked_fill(~asking[:, None], -math.inf)
        index = activity.topk(self._budget(num_queries), dim=-1).indices  # [B, H, u], most active first
        active = torch.arange(index.shape[-1], device=q.device) < self._budgets(asking)
        scores = q.take_along_dim(index[..., None], dim=2) @ k.mT
        weights = F.dropout(masked_softmax(scores, real[:, None, None]), self.dropout, self.training)
        read = weights.to(v.dtype) @ v

        count = real.sum(1).clamp_min(1)[:, None, None]
        wide = torch.promote_types(v.dtype, torch.float32)  # a long bf16 sum drifts
        mean = (v.masked_fill(~real[:, None, :, None], 0.0).sum(2, dtype=wide) / count)[:, :, None].to(v.dtype)
        read = torch.where(active[:, None, :, None], read, mean)
        heads = mean.expand(-1, -1, num_queries, -1)
        return heads.scatter(2, index[..., None].expand_as(read), read).transpose(1, 2)

    def _activity(self, q: Tensor, k: Tensor, real: Tensor) -> Tensor:
        """M(q) [B, H, T] over the sampled keys; q, k [B, H, T or S, K], real [B, S]."""
        num_keys = k.shape[2]
        rank = torch.randperm(num_keys, device=k.device) if self.training else self.rank[:num_keys]
        order = rank.expand_as(real).masked_fill(~real, len(self.rank))  # masked keys come last
        index = order.topk(self._budget(num_keys), dim=-1, largest=False).indices  # [B, U]
        sampled = (torch.arange(index.shape[-1], device=k.device) < self._budgets(real))[:, None, None]
        scores = q @ k.take_along_dim(index[:, None, :, None], dim=2).mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        mean = scores.masked_fill(~sampled, 0.0).sum(-1) / sampled.sum(-1).clamp_min(1)
        return scores.masked_fill(~sampled, -math.inf).amax(-1) - mean

    def _budget(self, length: int) -> int:
        """factor ceil(ln length), within 1 and length."""
        return min(length, self.factor * max(1, math.ceil(math.log(length))))

    def _budgets(self, real: Tensor) -> Tensor:
        """`_budget` of the number of real positions in each row: [B, T] bool -> [B, 1] int64."""
        table = torch.tensor([0, *map(self._budget, range(1, real.shape[1] + 1))], device=real.device)
        return table[real.sum(1, keepdim=True)]
