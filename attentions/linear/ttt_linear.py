"""TTT-Linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, State, repeat_heads, rotary
from attentions.linear._recurrence import masked, wide


@dataclass(kw_only=True)
class TTTState(State):
    """W over b [B, G, D + 1, D] at the start of the mini-batch, and the gradients summed since; cross: the last W."""

    weights: Tensor
    gradient: Tensor | None


class TTTLinear(QKVAttention):
    """The memory is a linear model that learns, while it reads, to reconstruct values from keys.

    f(z; W, b) = z + LN(z W + b) descends the gradient of |f(k_j) - v_j|^2 / 2, and position i reads f(q_i; W_i, b_i).
    Gradients are taken at the weights W_0 that a mini-batch of m positions starts with, which makes a mini-batch a few
    matrix products (the dual form): W_i = W_0 - tau_i sum_{j <= i} eta_j grad_j, eta_j = base_lr / D sigmoid(w.x_j + c)
    per head, tau_i = max(0, 1 / i + learned) for i = 1 .. m; the last W_i starts the next one. The first W and b are
    learned, and a layer norm over all heads precedes the output projection. 4 M^2 + M D parameters and small ones.

    Noncausal: it learns from either end with the same weights, and what the two read is averaged. Cross: it learns from
    the context, in order, and every query reads the last W and b; nothing is rotated. A masked position has no gradient
    but counts as a place in its mini-batch. Grouped heads share a model.

    Args:
        mini_batch: positions m per step of gradient descent.
        base_lr: scale of the inner learning rate.
        rotary_base: q and k are rotated by their place in the mini-batch with this base, which the backbone's replaces
            where there is one; None: not rotated.

    Source: Sun et al. 2024, https://arxiv.org/abs/2407.04620, sections 2.3 to 2.7; tau, rotation, norms and the start
    (W, w normal of 0.02; b, c = 0) from the authors' code with its Transformer backbone, whose layer lacks the gate and
    the convolution of their Mamba backbone. Differs: noncausal and cross forms are ours; rotation pairs channel j with
    j + D / 2, where theirs pairs neighbours: a fixed permutation of the channels.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2407.04620"
    complexity = "T mini_batch"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        mini_batch: int = 16,
        base_lr: float = 1.0,
        rotary_base: float | None = 10000.0,
    ):
        if mini_batch < 1:
            raise ValueError(f"mini_batch must be at least 1, got {mini_batch}")
        super().__init__(spec)
        groups, dim = spec.kv_heads, spec.head_dim
        self.rotary_base = None if spec.cross or rotary_base is None else spec.rotary_base or rotary_base
        if self.rotary_base is not None and dim % 2:
            raise ValueError(
                f"rotation pairs channels and needs an even width per head, got {dim}; "
                f"nearest: {max(2, dim - 1)}, {dim + 1}, or rotary_base=null"
            )
        self.mini_batch, self.base_lr = mini_batch, base_lr
        self.weights = nn.Parameter(torch.cat([0.02 * torch.randn(groups, dim, dim), torch.zeros(groups, 1, dim)], 1))
        self.rate_weight = nn.Parameter(0.02 * torch.randn(groups, spec.dim))
        self.rate_bias = nn.Parameter(torch.zeros(groups))
        self.tau_offset = nn.Parameter(torch.zeros(mini_batch))
        self.inner_weight, self.inner_bias = (
            nn.Parameter(torch.ones(groups, dim)),
            nn.Parameter(torch.zeros(groups, dim)),
        )
        self.norm = nn.LayerNorm(spec.num_heads * dim, eps=1e-6)

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        logits = F.linear(source, self.rate_weight, self.rate_bias)
        return {"rate": self.base_lr / self.key_dim * wide(logits).sigmoid()}  # eta

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(self.norm(heads.flatten(2).to(self.norm.weight.dtype)))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        if self.spec.pattern != Pattern.NONCAUSAL_SELF:
            return super().forward(x, context, key_mask=key_mask)
        mask = None if key_mask is None else key_mask.flip(1)
        runs = []
        for y, seen in ((x, key_mask), (x.flip(1), mask)):
            runs.append(self.attend(self.query(y), *self.key_value(y), key_mask=seen, **self.terms(y)))
        return self.merge(x, (runs[0] + runs[1].flip(1)) / 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        state = self.init_memory(k.shape[0], k)
        if self.spec.cross:
            return self.read(q, self.update(state, k, v, key_mask=key_mask, **terms))
        return self._learn(state, k, v, key_mask, terms["rate"], q)[0]

    def init_memory(self, batch_size: int, like: Tensor) -> TTTState:
        weights = wide(self.weights).expand(batch_size, -1, -1, -1).clone()
        return TTTState(weights=weights, gradient=None if self.spec.cross else torch.zeros_like(weights))

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> State:
        assert isinstance(state, TTTState)
        return self._learn(state, k, v, key_mask, terms["rate"], k[:, :, :0])[1]

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, TTTState)
        with torch.autocast(q.device.type, enabled=False):
            weights, left = state.weights, state.position % self.mini_batch
            if state.gradient is not None and left:
                weights = weights - self._tau()[left - 1] * state.gradient
            grouped = _with_one(wide(q)).transpose(1, 2).unflatten(1, (self.spec.kv_heads, -1))
            return self._model(q, (grouped @ weights.unsqueeze(2)).flatten(1, 2).transpose(1, 2))

    def state_bytes(self, length: int) -> int:
        return 4 * self.weights.numel() * (1 if self.spec.cross else 2)

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        """By the place in the mini-batch; `start` is the position of the first."""
        if self.rotary_base is None:
            return heads
        turned = rotary(self._on_grid(heads, start).flatten(0, 1), base=self.rotary_base)
        return self._off_grid(turned.unflatten(0, (heads.shape[0], -1)), start, heads.shape[1])

    # -- learning ---------------------------------------------------------------------------------

    def _learn(
        self, state: TTTState, k: Tensor, v: Tensor, key_mask: Tensor | None, rate: Tensor, q: Tensor
    ) -> tuple[Tensor, TTTState]:
        """What q [B, S, H, D] reads at the positions of k and v, and the state after them; q may have no heads.

        Positions lie on the grid of mini-batches, padded by keys that teach nothing (eta = 0). A column of ones in q
        and k lets one matrix hold W and b.
        """
        start, stop = state.position, state.position + k.shape[1]
        with torch.autocast(k.device.type, enabled=False):
            k, v, rate = (masked(wide(y), key_mask) for y in (k, v, rate))
            keys, targets, queries, rates = (
                self._on_grid(y, start).transpose(2, 3).unflatten(2, (self.spec.kv_heads, -1))  # [B, N, G, H / G, m, D]
                for y in (_with_one(k), v - k, _with_one(wide(q)), rate[..., None])
            )
            tau, steps = self._tau(), (rates * keys).mT
            mix = tau[:, None] * (queries @ steps).tril()  # tau_i eta_j (q_i.k_j + 1)
            weights = state.weights.unsqueeze(2)
            gradient = state.gradient.unsqueeze(2) if state.gradient is not None and start % self.mini_batch else None
            read = []
            for n in range(keys.shape[1]):
                error = self._error(keys[:, n] @ weights, targets[:, n])
                z = queries[:, n] @ weights - mix[:, n] @ error
                read.append(z if gradient is None else z - tau[:, None] * (queries[:, n] @ gradient))
                learned = steps[:, n] @ error
                gradient = learned if gradient is None else gradient + learned
                if n + 1 < keys.shape[1] or stop % self.mini_batch == 0:
                    weights, gradient = weights - tau[-1] * gradient, None
            if self.spec.cross and gradient is not None:
                weights = weights - tau[stop % self.mini_batch - 1] * gradient
            kept = None
            if not self.spec.cross:
                kept = (torch.zeros_like(weights) if gradient is None else gradient).squeeze(2)
            state = TTTState(weights=weights.squeeze(2), gradient=kept, position=stop)
            z = torch.stack(read, 1).flatten(2, 3).transpose(2, 3)
            return self._model(q, self._off_grid(z, start, q.shape[1])), state

    def _model(self, q: Tensor, z: Tensor) -> Tensor:
        """f at q: q + LN(z), for z = q W + b [B, T, H, D]."""
        scale, shift = (repeat_heads(wide(y)[None, None], z.shape[2]) for y in (self.inner_weight, self.inner_bias))
        return (wide(q) + F.layer_norm(z, z.shape[-1:], eps=1e-6) * scale + shift).to(q.dtype)

    def _error(self, z: Tensor, target: Tensor) -> Tensor:
        """Gradient of |LN(z) - target|^2 / 2 with respect to z [B, G, 1, m, D]."""
        scale, shift = (wide(y)[:, None, None] for y in (self.inner_weight, self.inner_bias))
        normed = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        outer = (normed * scale + shift - target) * scale
        inner = outer - outer.mean(-1, keepdim=True) - normed * (outer * normed).mean(-1, keepdim=True)
        return inner * (z.var(-1, keepdim=True, unbiased=False) + 1e-6).rsqrt()

    def _tau(self) -> Tensor:
        offset = wide(self.tau_offset)
        count = torch.arange(1, self.mini_batch + 1, device=offset.device, dtype=offset.dtype)
        return (1 / count + offset).clamp_min(0)

    def _on_grid(self, y: Tensor, start: int) -> Tensor:
        """[B, S, H, D] from position `start` on -> [B, N, m, H, D], zeros around."""
        front, back = start % self.mini_batch, -(start + y.shape[1]) % self.mini_batch
        return F.pad(y, (0, 0, 0, 0, front, back)).unflatten(1, (-1, self.mini_batch))

    def _off_grid(self, y: Tensor, start: int, length: int) -> Tensor:
        """[B, N, m, H, D] -> [B, S, H, D], the inverse."""
        return y.flatten(1, 2)[:, start % self.mini_batch :][:, :length]


def _with_one(y: Tensor) -> Tensor:
    return F.pad(y, (0, 1), value=1.0)
