"""BAM: a soft mixture of attention experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attentions.base import LayerSpec
from attentions.dense.softmax import KVCache, Softmax


class BAM(Softmax):
    """E softmax attentions side by side; each token weighs the outputs of all of them (branch, attend, mix).

        y_t = sum_e g_te Attention_e(x)_t,   g_t = softmax(W_r x_t) in R^E

    Each expert has its own W_q, W_k, W_v and W_o; with `share_kv` all read one W_k and W_v, and one cache. Routing is
    soft, so no balance loss is needed, and it reads the query's token alone, so every pattern is free. The experts are
    folded into the heads: each head of the slot holds E heads of its width D, SDPA runs once, the gate scales and one
    product with all W_o adds up. Parameters in softmax attention's: E (shared: (E + 1) / 2), and M E of the router;
    the state is E times as large (shared: equal). `upcycle` builds the layer from trained softmax layers, which is what
    the paper is about; a row of the benchmark trains it from the start.

    Args:
        num_experts: E.
        share_kv: one W_k and W_v for all experts.
        dropout: probability of dropping an attention weight in training.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2408.08274, sections 3.4, 4.1 and 5.1 (E = 4: a seed model and
    three branches). No code is public. Differs: the attention alone, without the experts of the feed-forward layer that
    stand beside it in their parallel block; noncausal, cross and grouped forms are ours.
    """

    paper = "https://arxiv.org/abs/2408.08274"

    def __init__(self, spec: LayerSpec, *, num_experts: int, share_kv: bool = False, dropout: float = 0.0):
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}; nearest: 1")
        super().__init__(spec, dropout=dropout)  # checks the width of one head
        self.num_experts = num_experts
        self.share_kv = share_kv
        self.key_dim = self.value_dim = num_experts * spec.head_dim
        stored = spec.kv_heads * spec.head_dim * (1 if share_kv else num_experts)
        self.q_proj = nn.Linear(spec.dim, num_experts * spec.dim, bias=False)  # [H, E, D]
        self.k_proj = nn.Linear(spec.dim, stored, bias=False)  # [G, E, D], shared: [G, D]
        self.v_proj = nn.Linear(spec.dim, stored, bias=False)
        self.out_proj = nn.Linear(num_experts * spec.dim, spec.dim, bias=False)
        self.router = nn.Linear(spec.dim, num_experts, bias=False)  # W_r

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        groups = self.spec.kv_heads
        k, v = self.k_proj(source).unflatten(-1, (groups, -1)), self.v_proj(source).unflatten(-1, (groups, -1))
        return self._rotate(k, start), v

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        single = heads.unflatten(-1, (-1, self.spec.head_dim)).flatten(2, 3)
        return super()._rotate(single, start).flatten(2).unflatten(-1, heads.shape[2:])

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        q, k, v = (self._experts(heads) for heads in (q, k, v))
        if self.share_kv:  # experts beside each other in a group, which reads one head
            output = super()._sdpa(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), visible, is_causal)
            return output.unflatten(2, (-1, self.num_experts)).flatten(3)
        # expert by expert, so that grouped heads stay inside of theirs
        q, k, v = (heads.transpose(2, 3).flatten(2, 3) for heads in (q, k, v))
        output = super()._sdpa(q, k, v, visible, is_causal)
        return output.unflatten(2, (self.num_experts, -1)).transpose(2, 3).flatten(3)

    def _experts(self, heads: Tensor) -> Tensor:
        """[B, S, G, E D] -> [B, S, G, E, D]."""
        return heads.unflatten(-1, (-1, self.spec.head_dim))

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        gate = self.router(x).softmax(-1)  # [B, T, E]
        return super().merge(x, (self._experts(heads) * gate[:, :, None, :, None]).flatten(3))

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        width = self.spec.head_dim if self.share_kv else self.key_dim
        empty = like.new_empty(batch_size, 0, self.spec.kv_heads, width)
        return KVCache(k=empty, v=empty.clone())

    def state_bytes(self, length: int) -> int:
        return 8 * length * self.spec.kv_heads * (self.spec.head_dim if self.share_kv else self.key_dim)


def upcycle(
    spec: LayerSpec, branches: Sequence[Mapping[str, Tensor]], *, share_kv: bool = False, dropout: float = 0.0
) -> BAM:
    """A BAM layer whose expert e is the softmax attention of `branches[e]`; the router keeps its random start.

    Args:
        spec: the slot that all branches were trained in.
        branches: state dicts of `Softmax` layers without bias.
        share_kv: one W_k and W_v for all, the mean of the branches'. BAM averages what is no expert; that it does so
            for shared keys and values is not confirmed from the paper's text.

    Raises:
        ValueError: no branch, or one that does not fit the slot.
    """
    if not branches:
        raise ValueError("upcycle needs at least one branch, got 0; nearest: 1")
    layer = BAM(spec, num_experts=len(branches), share_kv=share_kv, dropout=dropout)
    layer.to(next(iter(branches[0].values())))  # dtype and device
    shapes = {name: weight.shape for name, weight in Softmax(spec).state_dict().items()}
    for index, branch in enumerate(branches):
        found = {name: weight.shape for name, weight in branch.items()}
        if wrong := sorted({name for name, _ in shapes.items() ^ found.items()}):
            raise ValueError(
                f"branch {index} does not fit the slot: {', '.join(wrong)}; a softmax layer without bias has "
                f"{', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}"
            )

    def side_by_side(name: str, heads: int) -> Tensor:
        """[heads D, M] of each branch -> [heads E D, M], expert by expert within a head."""
        return torch.stack([branch[name].unflatten(0, (heads, -1)) for branch in branches], dim=1).flatten(0, 2)

    weights = {"q_proj.weight": side_by_side("q_proj.weight", spec.num_heads)}
    for name in ("k_proj.weight", "v_proj.weight"):
        mean = torch.stack([branch[name] for branch in branches]).mean(0)
        weights[name] = mean if share_kv else side_by_side(name, spec.kv_heads)
    rows = [branch["out_proj.weight"].unflatten(1, (spec.num_heads, -1)) for branch in branches]
    weights["out_proj.weight"] = torch.stack(rows, dim=2).flatten(1)
    layer.load_state_dict({**layer.state_dict(), **weights})
    return layer
