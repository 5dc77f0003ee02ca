"""Relative convolutional multi-head attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, State
from attentions.dense.softmax import KVCache, Softmax
from attentions.ssm._convolution import DepthwiseConv


@dataclass(kw_only=True)
class ConvolvedCache(KVCache):
    """Convolved keys and values, and the latest two projections [B, 2, H or G, D] that the convolutions still read.

    In cross-attention keys and values are written at once and leave none.
    """

    q_tail: Tensor
    k_tail: Tensor | None = None
    v_tail: Tensor | None = None


class RCMHA(Softmax):
    """Softmax attention over q, k and v that a short convolution has mixed, with learned relative positions.

        q, k, v = conv_3(W_q x), conv_3(W_k x), conv_3(W_v x + c)       one filter per channel of a head, for all heads
        s_hij = ((q_i + u_h) . k_j + q_i . R_h,j-i + b_h,j-i) / sqrt(D)

    Causal: a convolution reads the position and the two before it, R and b have one entry per distance. Noncausal: it
    is centred, and they have one per distance to either side. Cross-attention: distances between two sequences mean
    nothing, so there are no R and b. Masked positions enter no convolution. q . R is one product that padding and
    reshaping shift into place, and enters SDPA as its bias. Positions are the mechanism's own: the backbone's (rotary)
    do not enter.

    Decoding: softmax attention's cache, of convolved keys and values, and the latest two projections. A segment that
    follows a memory of earlier ones (Transformer-XL) is prefill and steps, which keep all of it.

    Parameters above softmax attention's: H (L (D + 1) + D) of the relative terms, L = max_length (noncausal:
    2 max_length - 1; cross: 0), 12 D of the convolutions, G D of c. At max_length = 64, M = 32 and H = 2: +59 %.

    Args:
        dropout: probability of dropping an attention weight in training.

    Source: Sugiharto et al. 2023, https://arxiv.org/abs/2308.03429, in the form of the authors' code; R, b and u start
    at zero there too. Differs: that code keeps 2 x 4096 distances and its causal model reads one half, here the slot's
    max_length sets them; it adds a bias to the output, here as in other rows none; where a segment follows a memory,
    its convolution of the queries starts from zeros, here it goes on; masks, noncausal, cross and grouped forms are
    ours. The formulas are not confirmed from the paper's text, and the code's main program imports another library's
    attention, without convolutions.
    """

    paper = "https://arxiv.org/abs/2308.03429"

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0):
        super().__init__(spec, dropout=dropout)
        self.v_proj = nn.Linear(spec.dim, spec.kv_heads * self.value_dim)
        self.q_conv, self.k_conv, self.v_conv = (DepthwiseConv(self.key_dim, 3, bias=True) for _ in range(3))
        self.query_bias = nn.Parameter(torch.zeros(spec.num_heads, self.key_dim))  # u
        if not spec.cross:  # by distance j - i, from 1 - max_length on
            distances = spec.max_length if spec.causal else 2 * spec.max_length - 1
            self.relative = nn.Parameter(torch.zeros(spec.num_heads, distances, self.key_dim))  # R
            self.relative_bias = nn.Parameter(torch.zeros(spec.num_heads, distances))  # b

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        return heads

    def _convolve(self, conv: DepthwiseConv, heads: Tensor, tail: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """[B, S, G, D] behind `tail` [B, 2, G, D] (None: zeros), which in a noncausal slot is always empty."""
        if mask is not None:
            heads = heads.masked_fill(~mask[:, :, None, None], 0.0)
        if tail is None:
            tail = torch.zeros_like(heads[:, :1]).expand(-1, 2, -1, -1)
        if self.spec.causal:
            return conv(heads, tail)
        return conv(F.pad(heads, (0, 0, 0, 0, 0, 1)), tail)[:, 1:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        q = self._convolve(self.q_conv, q, None, None if self.spec.cross else key_mask)
        k = self._convolve(self.k_conv, k, None, key_mask)
        v = self._convolve(self.v_conv, v, None, key_mask)
        if self.spec.cross:
            return super().attend(q + self.query_bias, k, v, key_mask=key_mask)
        length = q.shape[1]
        behind = self._relative(q, length, 0 if self.spec.causal else length - 1)
        width = behind.shape[-1]
        # padded to rows of width + 1 and read in rows of width from number T - 1 on, row i begins at distance -i
        shifted = F.pad(behind, (0, 1)).flatten(2)[..., length - 1 : length - 1 + length * width]
        visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device)
        if self.spec.causal:
            visible = visible.tril()
        if key_mask is not None:
            visible = visible & key_mask[:, None, None, :]
        return self._biased(q, k, v, shifted.unflatten(2, (length, width))[..., :length], visible)

    def read(self, q: Tensor, state: State) -> Tensor:
        """Read with one convolved query."""
        assert isinstance(state, ConvolvedCache)
        if self.spec.cross:
            return super().read(q + self.query_bias, state)
        bias = self._relative(q, state.k.shape[1], 0)
        return self._biased(q, state.k, state.v, bias, torch.ones_like(bias[:1, :1], dtype=torch.bool))

    def _relative(self, q: Tensor, behind: int, ahead: int) -> Tensor:
        """(q . R + b) / sqrt(D) [B, H, T, behind + ahead] at the distances from 1 - behind to `ahead`."""
        longest = self.spec.max_length
        if behind > longest:
            raise ValueError(f"the slot's max_length={longest} sets the distances, got {behind} positions")
        product = torch.einsum("bthd,hnd->bhtn", q, self.relative[:, longest - behind : longest + ahead])
        return (product + self.relative_bias[:, None, longest - behind : longest + ahead]) / math.sqrt(self.key_dim)

    def _biased(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor) -> Tensor:
        """SDPA with (q + u) and the bias [B, H, T, S] where visible [B or 1, 1, T, S]; without a key: zero."""
        empty = ~visible.any(-1, keepdim=True)
        output = F.scaled_dot_product_attention(
            (q + self.query_bias).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias.masked_fill(~(visible | empty), -math.inf),  # softmax of no score has a NaN in its gradient
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return output.masked_fill(empty, 0.0).transpose(1, 2)

    def init_memory(self, batch_size: int, like: Tensor) -> ConvolvedCache:
        cache = super().init_memory(batch_size, like)
        q_tail = like.new_zeros(batch_size, 2, self.spec.num_heads, self.key_dim)
        k_tail, v_tail = (None if self.spec.cross else like.new_zeros(batch_size, 2, *cache.k.shape[2:]) for _ in "kv")
        return ConvolvedCache(k=cache.k, v=cache.v, q_tail=q_tail, k_tail=k_tail, v_tail=v_tail)

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> ConvolvedCache:
        assert isinstance(state, ConvolvedCache)
        convolved_k = self._convolve(self.k_conv, k, state.k_tail, key_mask)
        convolved_v = self._convolve(self.v_conv, v, state.v_tail, key_mask)
        cache = super().update(state, convolved_k, convolved_v, key_mask=key_mask)
        return replace(
            state,
            k=cache.k,
            v=cache.v,
            mask=cache.mask,
            position=cache.position,
            k_tail=None if state.k_tail is None else self.k_conv.next_tail(k, state.k_tail),
            v_tail=None if state.v_tail is None else self.v_conv.next_tail(v, state.v_tail),
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, ConvolvedCache]:
        assert isinstance(state, ConvolvedCache)
        q, tail = self.query(x), state.q_tail
        if not self.spec.cross:
            state = self.update(state, *self.key_value(x))
        output = self.merge(x, self.read(self._convolve(self.q_conv, q, tail), state))
        return output, replace(state, q_tail=self.q_conv.next_tail(q, tail))

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        output, state = super().prefill(x, context, key_mask=key_mask)
        assert isinstance(state, ConvolvedCache)
        return output, replace(state, q_tail=self.q_conv.next_tail(self.query(x), state.q_tail))

    def state_bytes(self, length: int) -> int:
        streams = self.spec.num_heads + (0 if self.spec.cross else 2 * self.spec.kv_heads)
        return super().state_bytes(length) + 4 * 2 * streams * self.key_dim
