"""Coarse plus local in one softmax: queries of the source itself sum up its regions, each as a key and a value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, QKVAttention, State, repeat_heads
from attentions.linear._recurrence import wide
from attentions.lowrank._blocks import segments
from attentions.sparse._selection import masked_softmax


class Pooling(QKVAttention):
    """An attention whose memory is written with queries too: `attend` and `update` get `own` [B, S, H, K].

    In cross-attention these are the query projection of the context. In self-attention `attend` has them as q.

    Args:
        dropout: of the weights, in training; bias: on the four projections.
    """

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, bias=bias)
        self.dropout = dropout

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        return {"own": self.query(source)} if self.spec.cross else {}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q = self.query(x, state.position)
        if not self.spec.cross:
            state = self.update(state, *self.key_value(x, state.position), **{"own": q, **self.terms(x)})
        return self.merge(x, self.read(q, state)), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if self.spec.cross:
            return super().prefill(x, context, key_mask=key_mask)
        q, (k, v), terms = self.query(x), self.key_value(x), self.terms(x)
        state = self.update(self.init_state(len(x)), k, v, **{"own": q, **terms})
        return self.merge(x, self.attend(q, k, v, key_mask=key_mask, **terms)), state

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, G or H, D] -> [B, H, S, D], at least float32."""
        return repeat_heads(wide(x), self.spec.num_heads).transpose(1, 2)

    def _weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Softmax of the scores where seen; zeros elsewhere."""
        return F.dropout(masked_softmax(scores, seen), self.dropout, self.training)


def known(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Which positions of k [B, S, G, D] may be read: [B or 1, 1, S]."""
    return k.new_ones(1, 1, k.shape[1], dtype=torch.bool) if key_mask is None else key_mask[:, None]


def cut(x: Tensor, size: int) -> Tensor:
    """`segments` of a mask: [..., T] -> [..., N, size], False behind the end."""
    return segments(x[..., None], size)[..., 0]


def summarise(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A key and a value for each region: max_j k_j, and the mean of v_j that `shared_out` gives for max_j q_j.

    Args:
        q, k, v: [B, H, ..., n, D], regions of n positions; one query may stand for those of a region.
        seen: [B or 1, 1, ..., n], the positions that count.

    Returns:
        Keys [B, H, ..., K] and values [B, H, ..., V], and which regions have a position [B or 1, 1, ...].
    """
    return highest(k, seen), shared_out(highest(q, seen), k, v, seen), seen.any(-1)


def shared_out(top: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax_j(top . k_j / sqrt(K)) v_j over the seen positions of each region: [B, H, ..., V].

    Args:
        top: [B, H, ..., K]; the others as in `summarise`.
    """
    weights = masked_softmax((k @ top[..., None]).squeeze(-1) * k.shape[-1] ** -0.5, seen)
    return (weights[..., None, :] @ v).squeeze(-2)


def highest(x: Tensor, seen: Tensor) -> Tensor:
    """Maximum of each channel over the seen positions, [..., n, D] -> [..., D]; zero where none is."""
    lowest = x.masked_fill(~seen[..., None], torch.finfo(x.dtype).min)
    return lowest.amax(-2).masked_fill(~seen.any(-1, keepdim=True), 0.0)


def summarise_before(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`summarise` of the positions before each one of a line: keys [B, H, ..., n, K], values, seen [B or 1, 1, ..., n].

    Args as in `summarise`, with lines for regions.
    """
    none = ~seen.cummax(-1).values[..., None]
    lowest = torch.finfo(k.dtype).min
    top, key = (x.masked_fill(~seen[..., None], lowest).cummax(-2).values.masked_fill(none, 0.0) for x in (q, k))
    visible = seen[..., None, :] & seen.new_ones(seen.shape[-1], seen.shape[-1]).tril()
    value = masked_softmax(top @ k.mT * k.shape[-1] ** -0.5, visible) @ v
    key, value = (F.pad(x, (0, 0, 1, -1)) for x in (key, value))
    return key, value, F.pad(~none[..., 0], (1, -1))


def summarise_after(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`summarise_before` from the other end: of the positions after each one."""
    key, value, any_seen = summarise_before(q.flip(-2), k.flip(-2), v.flip(-2), seen.flip(-1))
    return key.flip(-2), value.flip(-2), any_seen.flip(-1)
