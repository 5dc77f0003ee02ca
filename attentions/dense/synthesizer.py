"""Synthesizers: attention weights that no key has a part in."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State, repeat_heads


@dataclass(kw_only=True)
class ValueCache(State):
    """All values [B, S, G, V] written so far; `mask` [B, S] of a context. `position` counts queries."""

    v: Tensor
    mask: Tensor | None = None


class Synthesizer(Attention):
    """softmax(B) G(X): scores B [T, S] come from the query's token or from positions alone, G(X) are the values.

    A member gives `scores`. Grouped heads share values; every query head has scores of its own. Keys sit at absolute
    positions, so a sequence or context longer than the slot's `max_keys` is refused. A query that sees no key reads
    zero.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2005.00743"
    complexity = "T S"

    def __init__(self, spec: LayerSpec, *, dropout: float):
        super().__init__(spec)
        self.dropout = dropout
        self.v_proj = nn.Linear(spec.dim, spec.kv_heads * spec.head_dim, bias=False)
        self.out_proj = nn.Linear(spec.dim, spec.dim, bias=False)

    @abstractmethod
    def scores(self, x: Tensor, start: int, num_keys: int) -> Tensor:
        """Scores [B or 1, H, T, S] of queries x [B, T, M] at positions `start`, ... for keys at 0, ..., S - 1."""

    def values(self, source: Tensor) -> Tensor:
        """[B, S, G, V]."""
        return self.v_proj(source).unflatten(-1, (self.spec.kv_heads, -1))

    def read(self, x: Tensor, start: int, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Queries x [B, T, M] from position `start` on read values [B, S, G, V] -> [B, T, M]."""
        num_keys = v.shape[1]
        _require(num_keys, self.spec.max_keys, "key")
        scores = self.scores(x, start, num_keys)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        visible = None if key_mask is None else key_mask[:, None, None, :]
        if self.spec.pattern == Pattern.CAUSAL_SELF:
            past = torch.ones(x.shape[1], num_keys, dtype=torch.bool, device=x.device).tril(start)
            visible = past if visible is None else visible & past
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if visible is not None:  # exact zeros, also in a row without a key
            weights = weights.masked_fill(~visible, 0.0)
        if self.training and self.dropout > 0:
            weights = F.dropout(weights.expand(x.shape[0], -1, -1, -1), self.dropout)
        weights, v = weights.to(v.dtype), repeat_heads(v, self.spec.num_heads)
        shared = weights.shape[0] == 1  # one matrix product for the whole batch, where rows have the same weights
        heads = torch.einsum("hts,bshd->bthd" if shared else "bhts,bshd->bthd", weights[0] if shared else weights, v)
        return self.out_proj(heads.flatten(2))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        self._require_context(context)
        return self.read(x, 0, self.values(x if context is None else context), key_mask)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        self._require_context(context)
        if context is not None:
            return ValueCache(v=self.values(context), mask=key_mask)
        empty = self.v_proj.weight.new_empty(batch_size, 0, self.spec.dim)
        return ValueCache(v=self.values(empty))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, ValueCache)
        v = state.v if self.spec.cross else torch.cat([state.v, self.values(x)], dim=1)
        output = self.read(x, state.position, v, state.mask)
        return output, dataclasses.replace(state, v=v, position=state.position + x.shape[1])

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0], context, key_mask=key_mask)
        return self.step(x, state)

    def state_bytes(self, length: int) -> int:
        return 4 * length * self.spec.kv_heads * self.spec.head_dim

    def _require_context(self, context: Tensor | None) -> None:
        if self.spec.cross != (context is not None):
            raise ValueError(
                f"spec.cross={self.spec.cross}, but a context was {'not ' if context is None else ''}given"
            )


class DenseSynthesizer(Synthesizer):
    """Each token predicts its weights over all positions: b_t = W_2 relu(W_1 x_t + b_1) + b_2 in every head.

    W_1 is [D, M] and W_2 [L, D] with L = `max_keys` of the slot; its first S rows serve S keys. That is M L + 3 M^2
    parameters and biases: 1.8 times softmax attention at M = 32, H = 2 and L = 128, 9 times at L = 1024. Factorised,
    W_2 gives vectors A [a] and B [b] with a b >= L, and key j scores A[j // b] B[j mod b]: 0.95 times at L = 128, 1.3
    at L = 1024. Here b = ceil(sqrt(L)), a = ceil(L / b).

    Args:
        factorised: scores are products of two short vectors.
        dropout: probability of dropping an attention weight in training.

    Source: Tay et al. 2020, https://arxiv.org/abs/2005.00743, section 3, dense and factorised dense. Differs: which of
    the two tilings repeats elements and which the vector is our choice, and A and B share W_1; W_2 is each head's own,
    where the authors' codes (Mesh TensorFlow, Long Range Arena) share it among heads; no bias on values and output;
    scores over a context in cross-attention are ours.
    """

    def __init__(self, spec: LayerSpec, *, factorised: bool = False, dropout: float = 0.0):
        super().__init__(spec, dropout=dropout)
        self.block = math.ceil(math.sqrt(spec.max_keys)) if factorised else 0  # b
        width = math.ceil(spec.max_keys / self.block) + self.block if factorised else spec.max_keys
        self.hidden_proj = nn.Linear(spec.dim, spec.dim)
        bound = spec.head_dim**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(spec.num_heads, spec.head_dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(spec.num_heads, 1, width).uniform_(-bound, bound))

    def scores(self, x: Tensor, start: int, num_keys: int) -> Tensor:
        hidden = F.relu(self.hidden_proj(x)).unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2)
        if not self.block:
            return hidden @ self.weight[..., :num_keys] + self.bias[..., :num_keys]
        outer, inner = (hidden @ self.weight + self.bias).tensor_split([-self.block], dim=-1)  # A, B
        outer = outer[..., : math.ceil(num_keys / self.block)]
        return (outer[..., :, None] * inner[..., None, :]).flatten(-2)[..., :num_keys]


class RandomSynthesizer(Synthesizer):
    """Weights that depend on positions alone: softmax(R), R [L, L] drawn at random and learned, per head.

    Factorised, R = R_1 R_2^T with R_1, R_2 [L, rank]. The layer has 2 M^2 + 2 H L rank parameters: as many as softmax
    attention for rank = M^2 / (H L), 4 at M = 32, H = 2 and L = 128; full, 2 M^2 + H L^2: 8.5 times as many there. In
    cross-attention R is [max_length, max_keys]: both count their positions from 0.

    Args:
        rank: columns of R_1 and R_2, k in the paper; None: R in full.
        trainable: learn R; otherwise it stays as drawn, from N(0, 1) (product: variance 1), and counts as no parameter.
        dropout: probability of dropping an attention weight in training.

    Source: Tay et al. 2020, https://arxiv.org/abs/2005.00743, section 3, random, fixed and factorised random (k = 8;
    Long Range Arena's code: 32, and cross-attention as here). Differs: R starts at unit variance in every form, where
    that code's starts at its linear layers' smaller one; no bias on values and output. In the authors' Mesh TensorFlow
    code (k = 16) both factors lack the query's position, so all queries read alike.
    """

    matrix: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, spec: LayerSpec, *, rank: int | None = 8, trainable: bool = True, dropout: float = 0.0):
        super().__init__(spec, dropout=dropout)
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1 or null, got {rank}; nearest: 1")
        shapes = {"matrix": (spec.max_length, spec.max_keys)}
        if rank is not None:
            shapes = {"rows": (spec.max_length, rank), "columns": (spec.max_keys, rank)}
        for name, shape in shapes.items():
            drawn = torch.randn(spec.num_heads, *shape) * (1 if rank is None else rank**-0.25)
            if trainable:
                self.register_parameter(name, nn.Parameter(drawn))
            else:
                self.register_buffer(name, drawn)
        self.rank = rank

    def scores(self, x: Tensor, start: int, num_keys: int) -> Tensor:
        stop = start + x.shape[1]
        _require(stop, self.spec.max_length, "query")
        if self.rank is None:
            return self.matrix[None, :, start:stop, :num_keys]
        return (self.rows[:, start:stop] @ self.columns[:, :num_keys].mT)[None]


def _require(length: int, limit: int, what: str) -> None:
    if length > limit:
        raise ValueError(
            f"a synthesizer has scores for the {limit} {what} positions of its slot, got {length}; "
            f"the slot's max_length{' (cross-attention: context_length)' * (what == 'key')} sets the number"
        )
