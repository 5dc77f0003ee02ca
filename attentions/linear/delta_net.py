"""DeltaNet."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State
from attentions.linear._recurrence import Memory, Recurrent, masked, width
from attentions.ssm._convolution import DepthwiseConv


@dataclass(kw_only=True)
class DeltaState(Memory):
    """The memory, and the last conv_size - 1 projections of q, k and v [B, conv_size - 1, channels]."""

    tail: Tensor


class DeltaNet(Recurrent):
    """Before it writes a value under a key, the memory forgets a share beta_t of what it held there.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T with beta_t = sigmoid(w.x_t). q, k and v pass a short causal
    convolution and SiLU; q and k are then set to unit length; RMS norm per head on the output. 4 M^2 parameters.

    Args:
        expand_k, expand_v: widths of keys and values over M / H, rounded down.
        conv_size: kernel of the short convolution, in positions.

    Source: Yang et al. 2024, https://arxiv.org/abs/2406.06484, sections 3.2 and 3.4 (rule: Schlag et al. 2021,
    https://arxiv.org/abs/2102.11174). Differs: no 1 / sqrt(K) on q, as in the paper; the authors' code has one, which
    the norm undoes. One convolution over the concatenated channels of q, k and v stands for three. Where the backbone
    asks for rotary positions, they turn the unit vectors.
    """

    patterns = Pattern.CAUSAL_SELF
    paper = "https://arxiv.org/abs/2406.06484"
    chunk_size = 32

    def __init__(self, spec: LayerSpec, *, expand_k: float = 1.0, expand_v: float = 1.0, conv_size: int = 4):
        super().__init__(spec, key_dim=width(spec, expand_k), value_dim=width(spec, expand_v))
        self.channels = tuple(proj.out_features for proj in (self.q_proj, self.k_proj, self.v_proj))
        self.conv = DepthwiseConv(sum(self.channels), conv_size)
        self.beta_proj = nn.Linear(spec.dim, spec.kv_heads, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        return {"beta": self.beta_proj(source).sigmoid()}

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(self.norm(heads.to(self.norm.weight.dtype)).flatten(2))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(masked(self._project(x), key_mask))
        return self.merge(x, self.attend(q, k, v, key_mask=key_mask, **self.terms(x)))

    def init_memory(self, batch_size: int, like: Tensor) -> DeltaState:
        return DeltaState(memory=self.empty_memory(batch_size, like), tail=self.conv.empty_tail(batch_size))

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) + 4 * self.conv.empty_tail(1).numel()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, state = self._advance(x, state)
        return self.merge(x, self.read(q, state)), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        _, state = self._advance(x, self.init_state(x.shape[0]))
        return self.forward(x), state

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The queries of x, and the state after its positions."""
        assert isinstance(state, DeltaState)
        raw = self._project(x)
        q, k, v = self._heads(raw, state.tail, state.position)
        state = dataclasses.replace(state, tail=self.conv.next_tail(raw, state.tail))
        return q, self.update(state, k, v, **self.terms(x))

    def _project(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def _heads(self, raw: Tensor, tail: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, heads, width] from their projections side by side."""
        q, k, v = F.silu(self.conv(raw, tail)).split(self.channels, dim=-1)
        q, k = (self._rotate(unit(x.unflatten(-1, (-1, self.key_dim))), start) for x in (q, k))
        return q, k, v.unflatten(-1, (-1, self.value_dim))


def unit(x: Tensor) -> Tensor:
    """x over its length in the last axis; zero stays zero, with a finite gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
