"""Sparsifiner: a low-rank sketch of the attention matrix predicts which keys each query reads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.dense.softmax import KVCache, Softmax
from attentions.linear._recurrence import masked, wide
from attentions.sparse._budget import largest_mask
from attentions.sparse._selection import masked_softmax
from attentions.sparse._teacher import dense_weights, visible_keys


@dataclass(kw_only=True)
class SketchCache(KVCache):
    """All keys and values, and the mixed keys of the predictor W_down^T k' [B, R, G, K / 2]."""

    mixed: Tensor


class Sparsifiner(Softmax):
    """Softmax over the keys to which a predicted attention matrix gives the largest weights, a fraction `keep` of them.

    The predictor, per head: q' and k' of half the width; c = softmax(q' (W_down^T k')^T / sqrt(H)) over R mixtures of
    positions, of which the largest `num_coefficients` stay; a basis |W_up| of R rows of weights over positions, from
    which values up to `basis_threshold` are cut; and c |W_up|^T ranks the keys. A query reads ceil(keep n) of its n
    visible keys, the first among equals.

    It learns nothing from the task: in train mode the sum of squares of c W_up^T - softmax(q k^T / sqrt(K)), with all
    coefficients and without a cut, over heads, queries and visible keys, a mean over the batch, is the loss
    `reconstruction`, which stops at q and k.

    W_down and W_up have N = spec.max_keys rows, of which a shorter sequence uses the first; rows of positions that
    training never reached keep their initial values. Causal: query t mixes with rows up to t, sum_{j <= t} W_down_j
    k'_j, which decoding carries along, and reads its basis up to t.

    Parameters beside softmax's 2 M^2 (1 + G / H): 2 N R + D^2 + D, or 0.4 of softmax's for M = 32, H = 2, N = 64.

    Args:
        keep: fraction of the visible keys that a query reads, in (0, 1].
        rank: R; None means N // 6.
        num_coefficients, basis_threshold: what the prediction keeps of c and of |W_up|.
        loss_weight: weight of the reconstruction.
        dropout, bias: as in softmax attention.

    Source: Wei et al. 2023, https://arxiv.org/abs/2303.13755; sizes, the two forms of the product and the root of H
    (not of the width) from the authors' code, not confirmed from the paper's text. Differs: predictor and layer learn
    together from scratch with the layer's own dense attention as target, where that code first fits the predictor to a
    trained model and then trains the rest; its loss is a sum over the batch, too, and a mean over layers; its budget is
    a fraction of N; there is no class token, whose row it keeps dense, and no pruning of tokens. The causal and cross
    forms are ours.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2303.13755"
    complexity = "T S"
    selects = True
    full_budget = staticmethod(lambda length: {"keep": 1.0})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        keep: float = 0.25,
        rank: int | None = None,
        num_coefficients: int = 8,
        basis_threshold: float = 0.02,
        loss_weight: float = 0.01,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {keep}")
        rank = max(1, spec.max_keys // 6) if rank is None else rank
        for name, value in (("rank", rank), ("num_coefficients", num_coefficients)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if basis_threshold < 0:
            raise ValueError(f"basis_threshold must be at least 0, got {basis_threshold}")
        self.keep, self.rank = keep, rank
        self.num_coefficients, self.basis_threshold, self.loss_weight = num_coefficients, basis_threshold, loss_weight
        self.sketch_width = max(1, self.key_dim // 2)
        self.sketch_q, self.sketch_k = (nn.Linear(self.key_dim, self.sketch_width) for _ in "qk")
        self.down, self.up = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(spec.max_keys, rank), std=0.02)) for _ in "du"
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        causal = self.spec.pattern == Pattern.CAUSAL_SELF
        visible = visible_keys(q.shape[1], k.shape[1], causal=causal, key_mask=key_mask, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            sketch, down = self._sketch(self.sketch_k, k, key_mask), self._rows(self.down, 0, k.shape[1])
            if causal:
                queries = self._sketch(self.sketch_q, q).transpose(1, 2)
                keys = repeat_heads(sketch, self.spec.num_heads).permute(0, 2, 3, 1)
                coefficients = self._coefficients((queries @ keys).tril() @ down)
            else:
                coefficients = self._read_mixed(q, torch.einsum("sr,bsgc->brgc", down, sketch))
        if self.training:
            seen = visible if key_mask is None or self.spec.cross else visible & key_mask[:, None, :, None]
            self.add_auxiliary(reconstruction=self.loss_weight * self._loss(q, k, coefficients, seen))
        return self._masked_attention(q, k, v, self.select(coefficients, visible))

    def _masked_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Softmax over the keys of mask [B, H, T, S]: from all scores, since gathering a quarter of them costs more."""
        k, v = (repeat_heads(heads, self.spec.num_heads).transpose(1, 2) for heads in (k, v))
        weights = masked_softmax((q.transpose(1, 2) * self.key_dim**-0.5) @ k.mT, mask)
        weights = F.dropout(weights, self.dropout, self.training)
        return (weights.to(v.dtype) @ v).transpose(1, 2)

    def _rows(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """Rows of W_down or W_up for these positions: [S, R]."""
        if stop > self.spec.max_keys:
            raise ValueError(f"the predictor covers max_keys={self.spec.max_keys} positions, got {stop}")
        return wide(weights[start:stop])

    def _sketch(self, linear: nn.Linear, heads: Tensor, mask: Tensor | None = None) -> Tensor:
        """q' or k' [B, S, H, K / 2], zero where masked; its gradient stays in the predictor."""
        return masked(F.linear(wide(heads.detach()), wide(linear.weight), wide(linear.bias)), mask)

    def _coefficients(self, scores: Tensor) -> Tensor:
        return (scores * self.spec.num_heads**-0.5).softmax(-1)

    def _read_mixed(self, q: Tensor, mixed: Tensor) -> Tensor:
        """c [B, H, T, R] of queries that see all mixed keys [B, R, G, K / 2]."""
        keys = repeat_heads(mixed, self.spec.num_heads).permute(0, 2, 3, 1)
        return self._coefficients(self._sketch(self.sketch_q, q).transpose(1, 2) @ keys)

    def _loss(self, q: Tensor, k: Tensor, coefficients: Tensor, visible: Tensor) -> Tensor:
        """Squared distance of c W_up^T from dense attention, a sum per sequence."""
        with torch.autocast(q.device.type, enabled=False):
            approximation = coefficients @ self._rows(self.up, 0, k.shape[1]).T
            distance = approximation - dense_weights(q, k, visible)
            return distance.masked_fill(~visible, 0.0).square().sum() / q.shape[0]

    @torch.no_grad()
    def select(self, coefficients: Tensor, visible: Tensor) -> Tensor:
        """The keys [B, H, T, S] that the coefficients [B, H, T, R] choose among the visible [B or 1, 1, T, S]."""
        with torch.autocast(coefficients.device.type, enabled=False):
            least = coefficients.topk(min(self.num_coefficients, self.rank)).values[..., -1:]
            basis = F.threshold(self._rows(self.up, 0, visible.shape[-1]).abs(), self.basis_threshold, 0.0)
            scores = coefficients.masked_fill(coefficients < least, 0.0) @ basis.T
            scores = scores.masked_fill(~visible, -math.inf)
        rounding = 1e-9  # 0.28 * 25 is a little more than 7
        budget = (self.keep * visible.sum(-1, keepdim=True).double() - rounding).ceil().long().clamp_min(1)
        most = math.ceil(self.keep * visible.shape[-1] - rounding)
        return largest_mask(scores, budget, most) & visible

    def init_memory(self, batch_size: int, like: Tensor) -> SketchCache:
        cache = super().init_memory(batch_size, like)
        mixed = wide(like.new_zeros(batch_size, self.rank, self.spec.kv_heads, self.sketch_width))
        return SketchCache(k=cache.k, v=cache.v, mixed=mixed)

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> SketchCache:
        assert isinstance(state, SketchCache)
        cache = super().update(state, k, v, key_mask=key_mask)
        with torch.autocast(k.device.type, enabled=False):
            down = self._rows(self.down, state.k.shape[1], cache.k.shape[1])
            mixed = state.mixed + torch.einsum("sr,bsgc->brgc", down, self._sketch(self.sketch_k, k, key_mask))
        return SketchCache(mixed=mixed, **{f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)})

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) + 4 * self.rank * self.spec.kv_heads * self.sketch_width

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, SketchCache)
        visible = visible_keys(q.shape[1], state.k.shape[1], causal=False, key_mask=state.mask, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            coefficients = self._read_mixed(q, state.mixed)
        return self._masked_attention(q, state.k, state.v, self.select(coefficients, visible))
