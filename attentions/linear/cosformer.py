"""cosFormer: linear attention that favours near positions by a cosine."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State
from attentions.linear._recurrence import Memory, Recurrent, wide


@dataclass(kw_only=True)
class Clocked(Memory):
    """A memory read at a position of its own: in cross-attention `queries` counts the reads, `position` the writes."""

    queries: int = 0


class CosFormer(Recurrent):
    """o_i = sum_j A_ij v_j / sum_j A_ij with A_ij = relu(q_i).relu(k_j) cos(pi / 2 (i - j) / M).

    The cosine of a difference is cos a cos b + sin a sin b, so each of q and k becomes 2 D features: relu(x) times the
    cosine and times the sine of its own angle pi i / 2 M. For |i - j| < M every weight is at least zero. A query whose
    features meet no key's reads zero.

    M is the longest length that the slot can see (`max_length`; in cross-attention the larger of it and of the
    context's): a constant, so that no output depends on how long its sequence turns out. Position M and beyond is
    refused, since its cosine could be negative.

    Source: Qin et al. 2022, https://arxiv.org/abs/2202.08791, relu features with the cosine re-weighting. Differs: the
    authors set M to the longer of the two sequences of each batch, which in causal attention lets a later position
    change earlier outputs, and padding change all; their four projections have biases, and their normaliser is at least
    1e-6 (here 1e-12). In cross-attention both sequences start at the same angle, as in their code. Where the backbone
    asks for rotary positions, they turn q and k before the relu.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2202.08791"
    normalised = True

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.span = max(spec.max_length, spec.max_keys)  # M

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return self._reweighted(super().query(x, start), start)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(source, start)
        return self._reweighted(k, start), v

    def _reweighted(self, heads: Tensor, start: int) -> Tensor:
        """Heads [B, T, H, K] whose first position is `start` -> [B, T, H, 2 K]."""
        end = start + heads.shape[1]
        if end > self.span:
            raise ValueError(
                f"cosFormer's weights reach {self.span} positions, got a sequence of {end}; "
                f"build the layer for max_length={end}"
            )
        angle = torch.arange(start, end, device=heads.device, dtype=wide(heads).dtype) * (math.pi / 2 / self.span)
        x = wide(heads).relu()
        angle = angle[:, None, None]
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1).to(heads.dtype)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.spec.cross:
            return super().step(x, state)
        assert isinstance(state, Clocked)
        output = self.merge(x, self.read(self.query(x, state.queries), state))
        return output, dataclasses.replace(state, queries=state.queries + 1)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        output, state = super().prefill(x, context, key_mask=key_mask)
        assert isinstance(state, Clocked)
        return output, dataclasses.replace(state, queries=x.shape[1])

    def init_memory(self, batch_size: int, like: Tensor) -> State:
        return Clocked(memory=self.empty_memory(batch_size, like))

    def empty_memory(self, batch_size: int, like: Tensor) -> Tensor:
        return wide(like.new_zeros(batch_size, self.spec.kv_heads, 2 * self.key_dim, self.value_dim + 1))
