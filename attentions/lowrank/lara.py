"""LARA: softmax attention as an expectation, estimated with a few samples that all queries share."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, QKVAttention, repeat_heads
from attentions.linear._recurrence import wide


class LARA(QKVAttention):
    """o_n = sum_c softmax_c(log iw_nc) v~_c: importance sampling with C proposals, linear randomised attention.

    Softmax attention of q_n is E[f(w)] under p_n(w) prop. to N(w; 0, I) xi(q_n, w) sum_m xi(k_m, w), where
    xi(x, w) = exp(w.x - |x|^2 / 2), f(w) = sum_m xi(k_m, w) v_m / sum_m xi(k_m, w), and q, k are over K^(1/4). One
    sample w_c from each of C Gaussians q_c = N(mu_c, I) gives v~_c = f(w_c) and the self-normalised weight

        iw_nc = alpha_nc p_n(w_c) / q_c(w_c),
        alpha_nc = q_c(w_c) / sum_c' q_c'(w_c) + r_nc - mean_c' r_nc',   r_nc = softmax_n(q~_c.q_n)

    the balance heuristic plus how near query n, among all queries, is to proposal c; at least 1e-8. The mean
    mu_c = q~_c + k~_c is that of the c-th of C equal stretches of queries plus that of keys. In evaluation w_c = mu_c:
    no random numbers.

    Stretches and r are of what is visible: masked positions are not counted, and where fewer queries or keys are left
    than C, there are as many proposals as those. A row without a key reads zero.

    Args:
        num_landmarks: proposals C.
        dropout: probability of dropping a query's weight on a sample in training.

    Source: Zheng, Wang, Kong 2022, https://arxiv.org/abs/2204.04667, section 4; alpha with its bound and its softmax
    over queries, the stretches and w_c = mu_c as in the authors' code (`mis-opt`). Differs: their trained proposals
    pass through a linear layer and a layer norm, left out as in CAB, whose alpha is exp(mu_c.q_n) instead; they add
    unit noise to mu before dividing by K^(1/4), here the noise has unit variance where q_c does; dropout is ours, and
    so is cross-attention, where queries and context are cut into stretches of their own.
    """

    patterns = Pattern.NONCAUSAL_SELF | Pattern.NONCAUSAL_CROSS
    impossible: ClassVar = {
        Pattern.CAUSAL_SELF: "its proposals are means over all queries and keys, later ones included",
        Pattern.CAUSAL_CROSS: "its proposals are means over all queries, later ones included",
    }
    paper = "https://arxiv.org/abs/2204.04667"
    complexity = "T num_landmarks"

    def __init__(self, spec: LayerSpec, *, num_landmarks: int = 16, dropout: float = 0.0):
        super().__init__(spec)
        if num_landmarks < 1:
            raise ValueError(f"num_landmarks must be at least 1, got {num_landmarks}")
        self.num_landmarks = num_landmarks
        self.dropout = dropout

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return self._estimate(q, k, v, key_mask).transpose(1, 2).to(q.dtype)

    def _estimate(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        keys = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        queries = q.new_ones(q.shape[:2], dtype=torch.bool) if self.spec.cross else keys
        absent = ~keys[:, :, None, None]
        k, v = (repeat_heads(x.masked_fill(absent, 0.0), self.spec.num_heads) for x in (k, v))
        q, k, v = (wide(x).transpose(1, 2) for x in (q, k, v))  # [B, H, T or S, D]
        q, k = q * self.key_dim**-0.25, k * self.key_dim**-0.25

        count = torch.minimum(queries.sum(1), keys.sum(1)).clamp(1, self.num_landmarks)  # proposals of each row
        near = self._means(q, queries, count)  # q~ [B, H, C, K]
        mu = near + self._means(k, keys, count)
        unused = (torch.arange(self.num_landmarks, device=q.device) >= count[:, None])[:, None, :, None]
        w = mu + torch.randn_like(mu) if self.training else mu

        log_k = log_xi(k, w).masked_fill(~keys[:, None, None, :], -1e30)  # [B, H, C, S]
        read = log_k.softmax(-1) @ v  # f(w_c); of a row without a key, a mean of zeros
        log_proposals = log_xi(mu, w)  # [B, H, C, C'], log q_c'(w_c) / N(w_c; 0, I)
        balance = log_proposals.masked_fill(unused.mT, -1e30).softmax(-1).diagonal(dim1=-2, dim2=-1)[..., None]
        nearness = (near @ q.mT).masked_fill(~queries[:, None, None, :], -1e30).softmax(-1)  # r [B, H, C, T]
        mean = nearness.masked_fill(unused, 0.0).sum(-2, keepdim=True) / count[:, None, None, None]
        alpha = (balance + nearness - mean).clamp_min(1e-8)
        own = log_proposals.diagonal(dim1=-2, dim2=-1)[..., None]
        log_weights = alpha.log() + log_xi(q, w) + log_k.logsumexp(-1, keepdim=True) - own
        weights = log_weights.masked_fill(unused, -1e30).softmax(-2)
        return F.dropout(weights, self.dropout, self.training).mT @ read

    def _means(self, x: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        """Means [B, H, C, K] of x [B, H, T, K] over `count` [B] equal visible stretches, longer ones last."""
        rank = visible.cumsum(1) - 1
        total, count = visible.sum(1, keepdim=True), count[:, None]
        size = (total // count).clamp_min(1)
        short = (size + 1) * count - total  # stretches of `size`, before the others of size + 1
        stretch = torch.minimum(rank // size, (rank + short) // (size + 1))
        landmarks = torch.arange(self.num_landmarks, device=x.device)[:, None]
        member = ((stretch[:, None] == landmarks) & visible[:, None]).to(x.dtype)
        return (member / member.sum(-1, keepdim=True).clamp_min(1))[:, None] @ x


def log_xi(x: Tensor, w: Tensor) -> Tensor:
    """w_c.x_n - |x_n|^2 / 2: x [..., N, K], w [..., C, K] -> [..., C, N]."""
    return w @ x.mT - x.square().sum(-1)[..., None, :] / 2
