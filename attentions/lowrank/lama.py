"""LAMA: low-rank bilinear attention that pools a sequence into a few vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._recurrence import masked, scan, wide

EPS = 1e-6  # under the root of the norm: where every affinity is 0, weights are equal and gradients finite


class LAMAPooling(nn.Module):
    """m weighted means of a sequence, E = A H, with weights from the bilinear affinity of each token to the whole.

        f_t = tanh((P^T c) * (Q^T h_t)), divided by its norm over the m heads      A = softmax of f over t

    (P^T c)_i (Q^T h_t)_i = c^T W_i h_t with W_i = p_i q_i^T of rank 1: 2 u m parameters instead of u^2 m. The affinity
    lies in [-1, 1], so the largest weight is at most e^2 times the smallest.

    Args:
        dim: u, width of a token.
        num_heads: m, at least 2, as the norm over one head would leave only its sign.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2 (affinities are normalised over heads), got {num_heads}")
        self.p = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, num_heads)))
        self.q = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, num_heads)))

    def affinity(self, tokens: Tensor, whole: Tensor) -> Tensor:
        """f [B, S, m] of tokens h [B, S, u] to c [B, S or 1, u]."""
        f = ((whole @ wide(self.p)) * (tokens @ wide(self.q))).tanh()
        return f * (f.square().sum(-1, keepdim=True) + EPS).rsqrt()

    def weights(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A [B, m, S]: each head's weights sum to 1, zero where masked; c is the mean of the unmasked tokens."""
        weights = self.affinity(tokens, mean(tokens, key_mask)).exp()  # f <= 1: no maximum to take off
        weights = masked(weights, key_mask).mT
        return weights / weights.sum(-1, keepdim=True).clamp_min(EPS)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """E [B, m, u] of tokens [B, S, u], at least float32; zeros where every token is masked."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = masked(wide(tokens), key_mask)
            return self.weights(tokens, key_mask) @ tokens


def mean(tokens: Tensor, key_mask: Tensor | None) -> Tensor:
    """[B, S, u] -> [B, 1, u], over unmasked tokens, which are zero where masked."""
    if key_mask is None:
        return tokens.mean(1, keepdim=True)
    return masked(tokens, key_mask).sum(1, keepdim=True) / key_mask.sum(1).clamp_min(1)[:, None, None]


@dataclass(kw_only=True)
class PoolState(State):
    """Of all tokens: their sum [B, u], per head the weighted sum [B, m, u] and the sum of weights [B, m]."""

    total: Tensor
    pooled: Tensor
    norm: Tensor


class LAMA(Attention):
    """Tokens read a few pooled vectors: o_t = W_o sum_i g_ti E_i with E from `LAMAPooling` and g_t = softmax(W_g x_t).

    The published mechanism pools: every token gets the same E. That positions read it through a gate of their own over
    the m heads is ours, and so is the causal form, where the weight of token j uses the mean c_j of the tokens up to j
    and stays as it was: E_t = sum_{j <= t} exp(f_j) x_j / sum_{j <= t} exp(f_j), a state of m (u + 1) + u numbers. In
    cross-attention the context is pooled, once, and queries gate it. A query that sees no key reads zero. Parameters:
    M^2 + 3 m M, 0.44 of softmax's at M = 32 and m = 8; the slot's heads do not enter.

    Args:
        num_heads: m, pooled vectors, at least 2.

    Source: Mehta et al. 2019, https://arxiv.org/abs/1912.00835, not confirmed from the paper's text: the affinity, c as
    the mean token and tanh before the norm are those of a third-party code, which names the paper's eq. 3.13 for them,
    https://github.com/JohnGiorgi/compact-multi-head-self-attention-pytorch. Differs: an eps under the norm's root;
    initial values are Xavier's, there uniform up to 1 / sqrt(m); the tokens are the layer's inputs, not a recurrent
    encoder's outputs; gate, projection, causal and cross forms are ours.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/1912.00835"
    complexity = "(T + S) num_heads"

    def __init__(self, spec: LayerSpec, *, num_heads: int = 8):
        super().__init__(spec)
        self.pool = LAMAPooling(spec.dim, num_heads)
        self.gate_proj = nn.Linear(spec.dim, num_heads, bias=False)
        self.out_proj = nn.Linear(spec.dim, spec.dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source, gate = self._source(x, context), self._gate(x)
        with torch.autocast(x.device.type, enabled=False):
            if self.spec.pattern == Pattern.CAUSAL_SELF:
                read = self._causal(gate, wide(source), key_mask)
            else:
                read = gate @ self.pool(source, key_mask)
        return self.out_proj(read.to(x.dtype))

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        if self.spec.cross:
            if context is None:
                raise ValueError("cross-attention decodes over a context: init_state(batch_size, context)")
            tokens = masked(wide(context), key_mask)
            weights = masked(self.pool.affinity(tokens, mean(tokens, key_mask)).exp(), key_mask)
            return PoolState(total=tokens.sum(1), pooled=weights.mT @ tokens, norm=weights.sum(1))
        shape = batch_size, self.pool.p.shape[1], self.spec.dim
        zeros = wide(self.pool.p.new_zeros(shape))
        return PoolState(total=zeros[:, 0].clone(), pooled=zeros, norm=zeros[..., 0].clone())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, PoolState)
        total, pooled, norm, position = state.total, state.pooled, state.norm, state.position + 1
        if not self.spec.cross:
            now = wide(x)
            total = total + now[:, 0]
            weight = self.pool.affinity(now, total[:, None] / position).exp()
            pooled, norm = pooled + weight.mT * now, norm + weight[:, 0]
        read = self._gate(x) @ (pooled / norm.clamp_min(EPS)[..., None])
        state = PoolState(total=total, pooled=pooled, norm=norm, position=position)
        return self.out_proj(read.to(x.dtype)), state

    def state_bytes(self, length: int) -> int:
        return 4 * (self.pool.p.shape[1] * (self.spec.dim + 1) + self.spec.dim)

    def _gate(self, x: Tensor) -> Tensor:
        """g [B, T, m], each token's weights over the pooled vectors."""
        return wide(self.gate_proj(x)).softmax(-1)

    def _causal(self, gate: Tensor, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """sum_i g_ti E_ti of every prefix: linear attention with queries g / norm and keys exp(f)."""
        x, seen = masked(x, key_mask), masked(torch.ones_like(x[..., :1]), key_mask)
        so_far = x.cumsum(1) / seen.cumsum(1).clamp_min(1)
        weights = self.pool.affinity(x, so_far).exp() * seen
        query = gate / weights.cumsum(1).clamp_min(EPS)
        return scan(query[:, :, None], weights[:, :, None], x[:, :, None])[:, :, 0]
