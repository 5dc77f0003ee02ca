"""Aaren: softmax attention of one learned query over every prefix, by a scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, State, repeat_heads
from attentions.linear._recurrence import masked, wide

NEVER = -1e30  # the logit of a position that is not there; finite, so that differences are
Sums = tuple[Tensor, Tensor]  # the largest logit m [..., 1], and sums of exp(s - m) times v and 1: w and u [..., V + 1]


@dataclass(kw_only=True)
class Prefix(State):
    """What the query knows of all positions so far: m [B, H, 1], and w and u [B, H, V + 1]; at least float32."""

    peak: Tensor
    sums: Tensor


class Aaren(QKVAttention):
    """o_t = sum_{j <= t} softmax_{j <= t}(q.k_j / sqrt(D)) v_j with a query q that is learned, the same at every t.

    The query is W_q applied to a learned vector of width M, so its logits s_j do not depend on t and a prefix is summed
    up by m = max s_j, u = sum exp(s_j - m), w = sum exp(s_j - m) v_j, with o = w / u. Two stretches join into one,
    m = max(m_a, m_b), u = u_a exp(m_a - m) + u_b exp(m_b - m) and w alike; this is associative, so all prefixes follow
    in log2 T steps, and decoding keeps one triple per head, H (D + 2) numbers at any length. No exponential exceeds 1.
    What the layer cannot do is look something up: it has one question, asked of everything.

    Noncausal self-attention: the softmax over the prefix and that over the suffix, own position in both, averaged with
    equal weights; joined into one they would be the same mean everywhere. Cross-attention pools the context: every
    output is the same, whatever stands in the stream. 4 M^2 + M parameters. A position that sees no key reads zero.

    Source: Feng et al. 2024, https://arxiv.org/abs/2405.13956; there is no official code. Each layer owns its vector:
    the reported 3,152,896 parameters are one Transformer layer of width 512, with an MLP of 2048, biases and two norms,
    and one vector. Where residual connections stand is not confirmed from the paper's text. Differs: no biases; the
    noncausal form is ours. Rotary positions of the backbone do not enter: a query that turned with t would need all
    keys kept.
    """

    patterns = Pattern.SELF | Pattern.NONCAUSAL_CROSS
    impossible: ClassVar = {
        Pattern.CAUSAL_CROSS: "its query is learned and reads no stream, so no output could depend on earlier queries"
    }
    paper = "https://arxiv.org/abs/2405.13956"
    complexity = "T log T, step by step T"

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.token = nn.Parameter(torch.randn(spec.dim))

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        """The learned query [B, T, H, K], a view of one [H, K]."""
        q = self.q_proj(self.token).unflatten(-1, (self.spec.num_heads, self.key_dim))
        return q.expand(*x.shape[:2], -1, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            peak, sums = self._single(q[:, :1], k, v, key_mask)
            if self.spec.cross:
                return mean(*total(peak, sums)).transpose(1, 2).expand(-1, q.shape[1], -1, -1).to(q.dtype)
            heads = mean(*prefixes(peak, sums))
            if not self.spec.causal:
                heads = (heads + mean(*prefixes(peak.flip(2), sums.flip(2))).flip(2)) / 2
            return heads.transpose(1, 2).to(q.dtype)

    def init_memory(self, batch_size: int, like: Tensor) -> Prefix:
        empty = wide(like.new_zeros(batch_size, self.spec.num_heads, self.value_dim + 1))
        return Prefix(peak=empty[..., :1] + NEVER, sums=empty)

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Prefix:
        assert isinstance(state, Prefix)
        with torch.autocast(k.device.type, enabled=False):
            peak, sums = total(*self._single(self.query(k[:, :1, 0]), k, v, key_mask))
            peak, sums = join((state.peak, state.sums), (peak[:, :, 0], sums[:, :, 0]))
        return Prefix(peak=peak, sums=sums, position=state.position + k.shape[1])

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, Prefix)
        return mean(state.peak, state.sums)[:, None].expand(-1, q.shape[1], -1, -1).to(q.dtype)

    def state_bytes(self, length: int) -> int:
        return 4 * self.spec.num_heads * (self.value_dim + 2)

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        return heads

    def _single(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Sums:
        """Every position on its own: m = s_j [B, H, S, 1], w and u = v_j and 1 [B, H, S, V + 1]; q [B, 1, H, K]."""
        k, v = (repeat_heads(masked(wide(x), key_mask), self.spec.num_heads) for x in (k, v))
        logits = (wide(q) * k).sum(-1, keepdim=True) * self.key_dim**-0.5
        sums = masked(F.pad(v, (0, 1), value=1.0), key_mask) * (logits - logits.detach()).exp()
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, :, None, None], NEVER)
        # m only scales: its gradient is zero, and that of a logit goes through the factor exp(s - m) = 1
        return logits.detach().transpose(1, 2), sums.transpose(1, 2)


def join(a: Sums, b: Sums) -> Sums:
    """Two stretches as one: the associative operator of the scan."""
    peak = torch.maximum(a[0], b[0])
    return peak, a[1] * (a[0] - peak).exp() + b[1] * (b[0] - peak).exp()


def prefixes(peak: Tensor, sums: Tensor) -> Sums:
    """The join of positions 0 .. t for every t, along the last axis but one: log2 T steps of doubled reach."""
    reach = 1
    while reach < peak.shape[-2]:
        near = peak[..., :reach, :], sums[..., :reach, :]
        far = join(
            (peak[..., :-reach, :], sums[..., :-reach, :]),
            (peak[..., reach:, :], sums[..., reach:, :]),
        )
        peak, sums = (torch.cat(pair, dim=-2) for pair in zip(near, far, strict=True))
        reach *= 2
    return peak, sums


def total(peak: Tensor, sums: Tensor) -> Sums:
    """The join of all positions: [..., 1, 1] and [..., 1, V + 1]."""
    largest = peak.amax(-2, keepdim=True)
    return largest, ((peak - largest).exp() * sums).sum(-2, keepdim=True)


def mean(peak: Tensor, sums: Tensor) -> Tensor:
    """w / u; zero where nothing was seen, and u is at least 1 elsewhere."""
    return sums[..., :-1] / sums[..., -1:].clamp_min(0.5)
