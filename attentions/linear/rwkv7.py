"""RWKV-7."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._dplr import scan
from attentions.linear._recurrence import Memory, masked, wide


@dataclass(kw_only=True)
class RWKV7State(Memory):
    """S [B, H, K, V], and the last input [B, 1, M] for the token shift."""

    last: Tensor


class RWKV7(Attention):
    """A delta rule whose decay, erasure and rate are vectors: the time mixing of RWKV-7 (Goose).

    S_t = diag(w_t) S_{t-1} - (a_t kappa_t) (kappa_t^T S_{t-1}) + k_t v_t^T, out = W (g * (norm(S_t^T r_t) + u_t)) with
    the bonus u_t = (r_t . rho k_t) v_t and a norm per head. Each of r, w, k, v, a, g has its input from the token shift
    x_t + mu (x_{t-1} - x_t). Decay w = exp(-e^(-1/2) sigmoid(.)), in-context learning rate a = sigmoid(.) and gate
    g = sigmoid(. D) U come from low-rank projections; kappa is (xi k) of unit length per head, and k grows to
    k (1 + alpha (a - 1)).

    Noncausal: the layer runs from either end with the same weights, and the two outputs are averaged. Cross: w, k, v, a
    come from the context and S is its last state; r and g from the queries, whose shift looks back in both cross
    patterns; no bonus, as a query has no k and v of its own. Grouped key-value heads and positions of the backbone
    (rotary) do not enter.

    Args:
        decay_rank, rate_rank, gate_rank: ranks of the projections of w, a and g. The layer has
            4 M^2 + 2 M (decay_rank + rate_rank + gate_rank) parameters and 13 M small ones (softmax: 4 M^2).

    Source: Peng et al. 2025, https://arxiv.org/abs/2503.14456, section 4.1; start of mu, w, a, xi, alpha, rho and the
    norm's scale from the authors' training code. Differs: the value residual is left out, because it carries the first
    layer's v through the others and a layer sees its own input only; the matrices of r, k, v and out start as the
    backbone says (theirs: orthogonal, k a tenth of that, out zero); noncausal and cross forms are ours.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2503.14456"
    complexity = "T"
    chunk_size: int = 32

    def __init__(self, spec: LayerSpec, *, decay_rank: int = 64, rate_rank: int = 64, gate_rank: int = 128):
        super().__init__(spec)
        for name, rank in {"decay_rank": decay_rank, "rate_rank": rate_rank, "gate_rank": gate_rank}.items():
            if rank < 1:
                raise ValueError(f"{name} must be at least 1, got {rank}")
        dim, heads, width = spec.dim, spec.num_heads, spec.head_dim
        depth, height = spec.layer / max(1, spec.num_layers - 1), 1 - spec.layer / spec.num_layers
        share = torch.arange(dim) / dim
        self.mix = nn.Parameter(  # mu of r, g and of w, k, v, a
            torch.stack([1 - share ** (power * height) for power in (0.2, 0.2, 0.9, 0.7, 0.7, 0.9)])
        )
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        ramp = torch.arange(dim) / max(1, dim - 1)  # over all channels, 0 to 1
        wave = (torch.arange(width) / max(1, width - 1) * 2 - 1).repeat(heads)  # over each head, -1 to 1
        wave = wave * wave.abs()
        self.decay_bias = nn.Parameter(-5.5 + 6 * ramp ** (1 + depth**0.3) + 2.5 * wave)
        self.decay_down, self.decay_up = _low_rank(dim, decay_rank)
        self.rate_bias = nn.Parameter(-0.19 + 0.3 * wave + 0.4 * (ramp - 0.5))
        self.rate_down, self.rate_up = _low_rank(dim, rate_rank)
        self.gate_down, self.gate_up = _low_rank(dim, gate_rank)
        self.removal = nn.Parameter(0.71 - 0.1 * (ramp - 0.5))  # xi
        self.replacement = nn.Parameter(torch.full((dim,), 1.02))  # alpha
        self.bonus = None if spec.cross else nn.Parameter(torch.full((heads, width), -0.04))  # rho
        scale = ((spec.layer + 1) / spec.num_layers) ** 0.7
        self.norm_weight, self.norm_bias = nn.Parameter(torch.full((dim,), scale)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        if self.spec.cross:
            return self.step(x, self.init_state(x.shape[0], context, key_mask=key_mask))[0]
        x = masked(x, key_mask)
        mixed, _ = self._run(x, self._start(x.shape[0]), key_mask)
        if not self.spec.causal:
            mask = None if key_mask is None else key_mask.flip(1)
            back, _ = self._run(x.flip(1), self._start(x.shape[0]), mask)
            mixed = (mixed + back.flip(1)) / 2
        return self.out_proj(mixed)

    # -- decoding ---------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> RWKV7State:
        state = self._start(batch_size)
        if not self.spec.cross:
            return state
        if context is None:
            raise ValueError("cross-attention reads a context: pass context [B, S, M]")
        context = masked(context, key_mask)
        k, v, terms = self._write(context, _shifted(context, state.last), key_mask)
        with torch.autocast(context.device.type, enabled=False):
            _, memory = scan(state.memory, torch.zeros_like(k), k, v, **terms, chunk_size=self.chunk_size)
        return RWKV7State(memory=memory, last=state.last)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, RWKV7State]:
        assert isinstance(state, RWKV7State)
        mixed, state = self._run(x, state)
        return self.out_proj(mixed), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, RWKV7State]:
        return self.step(x, self.init_state(x.shape[0], context, key_mask=key_mask))  # takes any number of positions

    def state_bytes(self, length: int) -> int:
        return 4 * self.spec.dim * (self.spec.head_dim + 1)

    def _start(self, batch_size: int) -> RWKV7State:
        weight, width = self.out_proj.weight, self.spec.head_dim
        memory = wide(weight.new_zeros(batch_size, self.spec.num_heads, width, width))
        return RWKV7State(memory=memory, last=weight.new_zeros(batch_size, 1, self.spec.dim))

    # -- the block --------------------------------------------------------------------------------

    def _run(self, x: Tensor, state: RWKV7State, key_mask: Tensor | None = None) -> tuple[Tensor, RWKV7State]:
        """What goes into the output projection [B, T, M] at some further positions, and the state after them."""
        shifted, memory = _shifted(x, state.last), state.memory
        for_r, for_gate = (x + (shifted - x) * mix for mix in self.mix[:2])
        r = self._heads(self.r_proj(for_r))
        gate = (for_gate @ self.gate_down).sigmoid() @ self.gate_up
        own: Tensor | float = 0.0
        if self.bonus is None:
            with torch.autocast(x.device.type, enabled=False):
                heads = (r.transpose(1, 2) @ memory).transpose(1, 2)
        else:
            k, v, terms = self._write(x, shifted, key_mask)
            with torch.autocast(x.device.type, enabled=False):
                heads, memory = scan(memory, r, k, v, **terms, chunk_size=self.chunk_size)
                own = ((r * k * wide(self.bonus)).sum(-1, keepdim=True) * v).flatten(2)
        normed = F.layer_norm(heads, heads.shape[-1:], eps=1e-5 * heads.shape[-1]).flatten(2)
        normed = normed * wide(self.norm_weight) + wide(self.norm_bias)
        mixed = (normed + own).to(gate.dtype) * gate
        return mixed, RWKV7State(memory=memory, last=x[:, -1:].clone(), position=state.position + x.shape[1])

    def _write(self, x: Tensor, shifted: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """k, v, and the log decay and the erasure; a masked position writes, decays and erases nothing."""
        for_decay, for_k, for_v, for_rate = (x + (shifted - x) * mix for mix in self.mix[2:])
        decay = wide((for_decay @ self.decay_down).tanh() @ self.decay_up) + wide(self.decay_bias)
        rate = self._heads((wide(for_rate @ self.rate_down @ self.rate_up) + wide(self.rate_bias)).sigmoid())
        k, v = self._heads(self.k_proj(for_k)), self._heads(self.v_proj(for_v))
        removal, replacement = self._heads(wide(self.removal)), self._heads(wide(self.replacement))
        kappa = F.normalize(k * removal, dim=-1, eps=1e-6)
        k = k * (1 + (rate - 1) * replacement)
        terms = {"log_decay": -math.exp(-0.5) * self._heads(decay.sigmoid()), "recall": -kappa, "rewrite": rate * kappa}
        return masked(k, key_mask), v, {name: masked(term, key_mask) for name, term in terms.items()}

    def _heads(self, channels: Tensor) -> Tensor:
        return wide(channels).unflatten(-1, (self.spec.num_heads, self.spec.head_dim))


def _shifted(x: Tensor, last: Tensor) -> Tensor:
    """x_{t-1} at every t of x [B, T, M]; `last` [B, 1, M] comes before the first."""
    return torch.cat([last, x[:, :-1]], dim=1)


def _low_rank(dim: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """[M, R] of zeros and [R, M] with a tenth of an orthogonal matrix, in the scale of the authors' code."""
    up = nn.init.orthogonal_(torch.empty(rank, dim), gain=0.1 * max(1.0, rank / dim) ** 0.5)
    return nn.Parameter(torch.zeros(dim, rank)), nn.Parameter(up)
