"""Mixture-of-head attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax

GATE_SCALES = ("code", "paper")
ROUTERS = ("learned", "query_norm")


class MoH(Softmax):
    """Softmax attention whose heads are weighted by a gate per token: some always, of the others the best few (MoH).

        y_t = sum_i g_ti head_i(t) W_O^i                        W_O^i: the columns of W_O that read head i
        g = [a_1 softmax(W_s x) ; a_2 softmax(W_r x) on its top K]      [a_1, a_2] = softmax(W_h x), scale "paper"
        g = [2 a_1 h_s softmax(W_s x) ; 2 a_2 K softmax(W_r x) / (its sum over the top K), on them]    scale "code"

    The first h_s heads are shared (always on), h_r are routed, K of them on for each query. Without shared heads there
    are no W_s and W_h, with one no W_s (its softmax is 1). The gate reads the query's token alone, so every pattern is
    free and the cache is softmax attention's; all heads are computed and then weighted, as in the authors' code, so
    the saving is one of counted operations. With zero routers and K = h_r the code's gates are 1: softmax attention.
    With K = 1 the code's gate of the chosen head is 2 a_2 whatever its score: W_r learns from the balance loss alone.

    Router "query_norm" has no parameters: the norms of the routed query heads over their standard deviation are the
    scores, the gate is 1 on their top K and 0 elsewhere, with the softmax of the scores as its gradient
    (straight-through).

    Auxiliary loss `moh_balance`: balance_weight * h_r sum_i P_i f_i (scale "paper": without h_r), averaged over layers;
    P_i is the mean probability of routed head i over tokens, f_i the fraction of tokens that select it.

    Numbers of heads: of N heads, h_s = round(shared N), at most N - 1, and K = round(active N) - h_s, between 1 and
    h_r; halves round up. A backbone with fewer than `min_heads` heads has each split into the fewest equal parts (for
    rotary positions of even width) that make as many; parameters stay. Grouped heads share split keys and values.
    Parameters above softmax attention's: M (h_s + h_r + 2).

    Args:
        shared: h_s / N, at least 0 and below 1.
        active: (h_s + K) / N, above `shared` and at most 1.
        min_heads: heads to route over, at least.
        gate_scale: "code" or "paper"; with router "query_norm" it scales the balance loss alone.
        router: "learned" or "query_norm".
        balance_weight: beta, of the balance loss.
        dropout: probability of dropping an attention weight in training.

    Source: Jin et al. 2024, https://arxiv.org/abs/2410.11842, eq. 5 and 6 (scale "paper"), 7 and 8 (loss), section 4.4
    with eq. 9 and 10 (straight-through), and its code for ViT, DiT (scale "code") and LLaMA3 (router "query_norm",
    released for inference, without a loss). Differs: the real-valued score that eq. 10 gives the gradient to is not
    spelt out, we take the LLaMA3 code's softmax, for the loss too; that code leaves the scores of equal query norms
    undefined, here they are uniform, and tunes a trained model, we train from the start; one pair of fractions serves
    all layers, where ViT and DiT vary it with depth; splitting heads and the rounding (the LLaMA3 code truncates) are
    ours; cross and grouped forms follow from the gate's reading the query alone.
    """

    paper = "https://arxiv.org/abs/2410.11842"
    selects = True

    def __init__(
        self,
        spec: LayerSpec,
        *,
        shared: float,
        active: float,
        min_heads: int = 1,
        gate_scale: str = "code",
        router: str = "learned",
        balance_weight: float = 0.01,
        dropout: float = 0.0,
    ):
        if not 0 <= shared < active <= 1:
            raise ValueError(
                f"0 <= shared < active <= 1 is needed, got shared={shared} and active={active}; nearest: 0.5 and 0.75"
            )
        for name, value, known in (("gate_scale", gate_scale, GATE_SCALES), ("router", router, ROUTERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}; nearest: {known[0]}")
        super().__init__(spec, dropout=dropout)
        self.split = _parts(spec, min_heads)
        heads = spec.num_heads * self.split
        self.num_shared = min(heads - 1, math.floor(shared * heads + 0.5))  # h_s
        self.num_routed = heads - self.num_shared  # h_r
        self.top_k = min(self.num_routed, max(1, math.floor(active * heads + 0.5) - self.num_shared))  # K
        self.router = router
        self.gate_scale = gate_scale
        self.balance_weight = balance_weight
        if router == "query_norm" and self.num_routed < 3:
            raise ValueError(
                "router query_norm compares at least three routed heads (two over their deviation always differ "
                f"alike), got {self.num_routed} of {heads}; nearest: min_heads={2 * heads}"
            )
        if router == "learned":
            self.routed_router = nn.Linear(spec.dim, self.num_routed, bias=False)  # W_r
            if self.num_shared > 0:
                self.kind_router = nn.Linear(spec.dim, 2, bias=False)  # W_h
            if self.num_shared > 1:
                self.shared_router = nn.Linear(spec.dim, self.num_shared, bias=False)  # W_s

    def gates(self, x: Tensor) -> Tensor:
        """g [B, T, N] of the queries' stream x [B, T, M]; leaves the balance loss in train mode."""
        if self.router == "learned":
            probability = self.routed_router(x).softmax(-1)
        else:
            # lengths do not change under rotation, so the projection before it will do
            norms = self.q_proj(x).unflatten(-1, (-1, self.key_dim // self.split)).norm(dim=-1)[..., self.num_shared :]
            probability = (norms / norms.std(-1, keepdim=True).clamp_min(1e-6)).softmax(-1)
        chosen = torch.zeros_like(probability).scatter(-1, probability.topk(self.top_k).indices, 1.0)
        code = self.gate_scale == "code"
        balance = (probability.mean((0, 1)) * chosen.mean((0, 1))).sum() * (self.num_routed if code else 1)
        self.add_auxiliary(moh_balance=self.balance_weight / self.spec.num_layers * balance)
        if self.router == "query_norm":
            shared = torch.ones_like(probability[..., :1]).expand(*x.shape[:2], self.num_shared)
            return torch.cat([shared, chosen + (probability - probability.detach())], dim=-1)
        routed = probability * chosen
        if code:
            routed = self.top_k * routed / routed.sum(-1, keepdim=True)
        if self.num_shared == 0:
            return routed
        kinds = (2 if code else 1) * self.kind_router(x).softmax(-1)
        if self.num_shared == 1:
            return torch.cat([kinds[..., :1], kinds[..., 1:] * routed], dim=-1)
        shared = (self.num_shared if code else 1) * self.shared_router(x).softmax(-1)
        return torch.cat([kinds[..., :1] * shared, kinds[..., 1:] * routed], dim=-1)

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        narrow = heads.flatten(2).unflatten(-1, (-1, self.value_dim // self.split))
        return super().merge(x, narrow * self.gates(x)[..., None])

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        return super()._rotate(self._narrow(heads), start).flatten(2).unflatten(-1, heads.shape[2:])

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        output = super()._sdpa(self._narrow(q), self._narrow(k), self._narrow(v), visible, is_causal)
        return output.flatten(2).unflatten(-1, (q.shape[2], -1))

    def _narrow(self, heads: Tensor) -> Tensor:
        """[B, S, G, D] -> [B, S, G split, D / split]."""
        return heads.unflatten(-1, (self.split, -1)).flatten(2, 3)


def _parts(spec: LayerSpec, min_heads: int) -> int:
    """Into how many parts each head is split."""
    if min_heads < 1:
        raise ValueError(f"min_heads must be at least 1, got {min_heads}; nearest: 1")
    multiple = 1 if spec.rotary_base is None or spec.cross else 2
    fit = [n for n in range(1, spec.head_dim + 1) if spec.head_dim % (n * multiple) == 0]
    enough = [n for n in fit if n * spec.num_heads >= min_heads]
    if not enough:
        raise ValueError(
            f"{spec.num_heads} heads of width {spec.head_dim} cannot be split into min_heads={min_heads}"
            f"{' of even width (rotary positions)' * (multiple == 2)}; nearest: {max(fit, default=1) * spec.num_heads}"
        )
    return enough[0]
