"""ABC: softmax attention to a fixed number of memory slots, written under a learned control."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, State, repeat_heads
from attentions.linear._recurrence import wide

NEVER = -1e30  # the control of a position that is not there; finite, so that differences are


@dataclass(kw_only=True)
class Slots(State):
    """What was written, in units of exp(peak): keys [B, G, n, K], values and summed weights [B, G, n, V + 1].

    peak [B, G, n] is the largest control so far. At least float32.
    """

    keys: Tensor
    values: Tensor
    peak: Tensor


class ABC(QKVAttention):
    """softmax(q K~^T / sqrt(K)) V~ over n slots, each the mean of all visible keys and values under its own weights.

    The weights of slot c are softmax_j(a_jc) over positions with a_j = W_phi x_j, one control per key-value head. In
    causal self-attention the softmax runs over the prefix: K~ and V~ are sums of exp(a_jc) k_j and exp(a_jc) v_j over
    the sum of exp(a_jc), all of them in units of the largest exp(a_jc) so far, which is exact and cannot overflow.

    All positions at once: inside a chunk of C positions the weights of every pair and slot are formed, C n numbers per
    position; scores against a prefix's slots are then sums over its keys of weight times q.k, so that slots are kept
    at the ends of chunks only. A query that sees no key reads zero.

    The control costs M G n parameters, n / 4 K of softmax's 4 M^2 (G = H): 25 % for 16 slots and heads of width 16, 6 %
    for heads of width 64.

    Args:
        num_slots: n.
        dropout: probability of dropping a query's weight on a slot in training.

    Source: Peng et al. 2021, https://arxiv.org/abs/2110.02488, ABC_MLP: alpha_i = exp(W_phi x_i), normalised over
    positions; causal as in `naive_cumsum_abc` of flash-linear-attention, and in two passes as in Zhang et al. 2024,
    https://arxiv.org/abs/2409.07146. Differs: dropout is ours. CAB controls keys by k and values by v, with matrices
    that its heads share, and its causal form leaves out the sum over the prefix.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2110.02488"
    complexity = "T num_slots"
    chunk_size: int = 16  # changes speed only

    def __init__(self, spec: LayerSpec, *, num_slots: int = 16, dropout: float = 0.0):
        super().__init__(spec)
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self.num_slots = num_slots
        self.dropout = dropout
        self.control_proj = nn.Linear(spec.dim, spec.kv_heads * num_slots, bias=False)  # W_phi

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        return {"control": self.control_proj(source).unflatten(-1, (self.spec.kv_heads, self.num_slots))}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        if self.spec.pattern != Pattern.CAUSAL_SELF:
            return self.read(q, self.update(self.init_memory(k.shape[0], k), k, v, key_mask=key_mask, **terms))
        with torch.autocast(q.device.type, enabled=False):
            k, v, control = (repeat_heads(x, self.spec.num_heads) for x in _present(k, v, terms["control"], key_mask))
            return self._scan(wide(q) * self.key_dim**-0.5, k, v, control).to(q.dtype)

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, control: Tensor) -> Tensor:
        """Every prefix read by its own query: [B, T, H, V]. Letters: n chunk, i query, j key, c slot."""
        length = q.shape[1]
        num_chunks = math.ceil(length / self.chunk_size)
        size = math.ceil(length / num_chunks)
        padding = 0, 0, 0, 0, 0, num_chunks * size - length
        q, k, v, control = (F.pad(x, padding).transpose(1, 2) for x in (q, k, v, control))
        peak = control.detach().cummax(dim=2).values
        q, k, v, control, peak = (x.unflatten(2, (num_chunks, size)) for x in (q, k, v, control, peak))
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        weights = control[..., None, :, :] - peak[..., :, None, :]  # [B, H, n, i, j, c]
        weights = weights.masked_fill(future[..., None], -math.inf).exp()
        keys, values, carried = self._before_chunks(k, v, control, peak)
        ones = v[..., None, :, -1].expand(*q.shape[:-1], -1)  # [B, H, n, i, j], zero where masked
        scores, total = (torch.stack([q @ k.mT, ones], dim=-2) @ weights).unbind(-2)
        total = (total + carried * values[..., -1][..., None, :]).clamp_min(0.5)  # at least 1, or 0: nothing to read
        scores = (scores + carried * (q @ keys.mT)) / total
        read = F.dropout(scores.softmax(-1), self.dropout, self.training) / total
        within = (weights @ read[..., None]).squeeze(-1) @ v[..., :-1]
        return (within + (read * carried) @ values[..., :-1]).flatten(2, 3)[:, :, :length].transpose(1, 2)

    @staticmethod
    def _before_chunks(k: Tensor, v: Tensor, control: Tensor, peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots before each chunk, [B, H, n, c, K] and [B, H, n, c, V + 1], and what each position keeps of them."""
        last = peak[..., -1, :]
        start = torch.cat([peak[:, :, :1, 0], last[:, :, :-1]], dim=2)
        new = (control - last[..., None, :]).exp().mT @ torch.cat([k, v], dim=-1)
        keep = (start - last).exp()[..., None]
        slots = [torch.zeros_like(new[:, :, 0])]
        for n in range(new.shape[2] - 1):
            slots.append(slots[-1] * keep[:, :, n] + new[:, :, n])
        keys, values = torch.stack(slots, dim=2).split([k.shape[-1], v.shape[-1]], dim=-1)
        return keys, values, (start[..., None, :] - peak).exp()

    def init_memory(self, batch_size: int, like: Tensor) -> Slots:
        empty = wide(like.new_zeros(batch_size, self.spec.kv_heads, self.num_slots, 1))
        return Slots(
            keys=empty.repeat(1, 1, 1, self.key_dim),
            values=empty.repeat(1, 1, 1, self.value_dim + 1),
            peak=empty[..., 0] + NEVER,
        )

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Slots:
        assert isinstance(state, Slots)
        with torch.autocast(k.device.type, enabled=False):
            k, v, control = (x.transpose(1, 2) for x in _present(k, v, terms["control"], key_mask))
            peak = torch.maximum(state.peak, control.detach().amax(2))
            weights = (control - peak[:, :, None]).exp().mT
            keep = (state.peak - peak).exp()[..., None]
            keys, values = state.keys * keep + weights @ k, state.values * keep + weights @ v
        return Slots(keys=keys, values=values, peak=peak, position=state.position + k.shape[2])

    def state_bytes(self, length: int) -> int:
        return 4 * self.spec.kv_heads * self.num_slots * (self.key_dim + self.value_dim + 2)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, Slots)
        with torch.autocast(q.device.type, enabled=False):
            total = state.values[..., -1:].clamp_min(0.5)
            groups = self.spec.num_heads // self.spec.kv_heads
            keys, values = (
                x.repeat_interleave(groups, 1) for x in (state.keys / total, state.values[..., :-1] / total)
            )
            scores = wide(q).transpose(1, 2) @ keys.mT * self.key_dim**-0.5
            weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
            return (weights @ values).transpose(1, 2).to(q.dtype)


def _present(k: Tensor, v: Tensor, control: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values with a column of ones, and controls, so that a masked position weighs nothing."""
    k, v, control = wide(k), F.pad(wide(v), (0, 1), value=1.0), wide(control)
    if key_mask is not None:
        absent = ~key_mask[:, :, None, None]
        k, v, control = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0), control.masked_fill(absent, NEVER)
    return k, v, control
