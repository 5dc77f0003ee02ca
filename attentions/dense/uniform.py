"""Uniform attention: the mean of all visible values, the floor of mechanisms that move something."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State


@dataclass(kw_only=True)
class RunningMean(State):
    """The sum [B, M] of all values written and their number [B]."""

    total: Tensor
    count: Tensor


class Uniform(Attention):
    """Every visible position counts the same: o_t = W_o mean_j W_v x_j. What a mechanism scores above it, it selects.

    Softmax attention with scores that are all equal. A query that sees no key reads zero. 2 M^2 parameters; as a floor
    it has no dropout.

    Source: ours, as the floor under the rows that learn where to look; Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762, eq. 1 with Q = 0.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/1706.03762"
    complexity = "T + S"

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.v_proj = nn.Linear(spec.dim, spec.dim, bias=False)
        self.out_proj = nn.Linear(spec.dim, spec.dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source = self._source(x, context)
        values, seen = self.v_proj(source), torch.ones_like(source[..., :1])
        if key_mask is not None:
            values, seen = (part.masked_fill(~key_mask[..., None], 0.0) for part in (values, seen))
        # at least float32: a bf16 count stands still at 256
        wide = torch.promote_types(values.dtype, torch.float32)
        if self.spec.pattern == Pattern.CAUSAL_SELF:
            total, count = values.cumsum(1, dtype=wide), seen.cumsum(1, dtype=wide)
        else:
            total, count = values.sum(1, keepdim=True, dtype=wide), seen.sum(1, keepdim=True, dtype=wide)
        mean = (total / count.clamp_min(1)).to(x.dtype)
        return self.out_proj(mean).expand(-1, x.shape[1], -1)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        like = self.v_proj.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        state = RunningMean(
            total=like.new_zeros(batch_size, self.spec.dim, dtype=wide), count=like.new_zeros(batch_size, dtype=wide)
        )
        if not self.spec.cross:
            return state
        if context is None:
            raise ValueError("cross-attention decodes over a context: init_state(batch_size, context)")
        return self._write(context, state, key_mask)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, RunningMean)
        if not self.spec.cross:
            state = self._write(x, state, None)
        mean = (state.total / state.count.clamp_min(1)[:, None]).to(x.dtype)
        return self.out_proj(mean)[:, None].expand(-1, x.shape[1], -1), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0], context, key_mask=key_mask)
        assert isinstance(state, RunningMean)
        return self(x, context, key_mask=key_mask), state if self.spec.cross else self._write(x, state, None)

    def state_bytes(self, length: int) -> int:
        return 4 * (self.spec.dim + 1)

    def _write(self, source: Tensor, state: RunningMean, key_mask: Tensor | None) -> RunningMean:
        values, seen = self.v_proj(source), torch.ones_like(source[..., 0], dtype=state.count.dtype)
        if key_mask is not None:
            values, seen = values.masked_fill(~key_mask[..., None], 0.0), seen * key_mask
        return dataclasses.replace(
            state,
            total=state.total + values.sum(1, dtype=state.total.dtype),
            count=state.count + seen.sum(1),
            position=state.position + source.shape[1],
        )
