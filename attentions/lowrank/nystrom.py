"""Nystromformer."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, repeat_heads
from attentions.linear._recurrence import masked, wide
from attentions.lowrank._blocks import masked_softmax


class Nystrom(QKVAttention):
    """Softmax attention through landmarks: segment means of queries and of keys, joined by a pseudo-inverse.

    With landmarks Q~ and K~ and s(A, B) = softmax(A B^T / sqrt(D)) over the rows of B,

        O = s(Q, K~) Z s(Q~, K) V + conv(V),      Z = the pseudo-inverse of A = s(Q~, K~), by iteration:
        Z_0 = A^T / (|A|_1 |A|_inf),   Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4.

    The n positions that a mask leaves are cut into min(num_landmarks, n) segments whose lengths differ by at most one.
    With as many landmarks as positions O is softmax attention, and computed as such. The depthwise convolution over
    the values, one kernel per key-value head, needs a common origin: self-attention only.

    Args:
        num_landmarks: segments of queries and of keys.
        num_iterations: of the pseudo-inverse.
        conv_kernel: positions that the convolution sees, odd; None: no convolution.
        dropout: of the weights s(Q, K~) in training.
        bias: bias on the projections.

    Source: Xiong et al. 2021, https://arxiv.org/abs/2102.03902, section 3 and algorithm 1; convolution and exact case
    as in the authors' code. Differs: the norms in Z_0 are each matrix's own, where that code takes the largest of the
    batch and inputs of other rows matter; segments of unequal length; masked positions, which that code counts as zeros
    in the means, are left out; dropout, which that code lacks; queries and keys may differ in number (cross-attention),
    so A need not be square.
    """

    patterns = Pattern.NONCAUSAL_SELF | Pattern.NONCAUSAL_CROSS
    impossible: ClassVar = {
        Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS: "landmarks are means over segments of all queries, later ones too"
    }
    paper = "https://arxiv.org/abs/2102.03902"
    complexity = "(T + S) num_landmarks + num_landmarks^3"
    full_budget = staticmethod(lambda length: {"num_landmarks": length, "conv_kernel": None})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        num_landmarks: int = 64,
        num_iterations: int = 6,
        conv_kernel: int | None = 33,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, bias=bias)
        for name, value in (("num_landmarks", num_landmarks), ("num_iterations", num_iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if conv_kernel is not None and (conv_kernel < 1 or conv_kernel % 2 == 0):
            raise ValueError(f"conv_kernel must be odd, got {conv_kernel}; nearest: {max(1, conv_kernel + 1)}")
        self.num_landmarks, self.num_iterations, self.dropout = num_landmarks, num_iterations, dropout
        self.kernel: nn.Parameter | None = None
        if conv_kernel is not None and not spec.cross:
            bound = conv_kernel**-0.5  # torch's for a convolution
            self.kernel = nn.Parameter(torch.empty(spec.kv_heads, conv_kernel).uniform_(-bound, bound))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            keys, values = wide(k), masked(wide(v), key_mask)
            residual = None if self.kernel is None else self._convolve(values)
            query, keys, values = (
                repeat_heads(x, self.spec.num_heads).transpose(1, 2) for x in (wide(q), keys, values)
            )
            heads = self._landmarks(query * self.key_dim**-0.5, keys, values, key_mask).transpose(1, 2)
            if residual is not None:
                heads = heads + repeat_heads(residual, self.spec.num_heads)
            return heads.to(q.dtype)

    def _landmarks(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """q [B, H, T, D], k and v [B, H, S, D] -> [B, H, T, D]."""
        seen = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        keys = seen[:, None, None]
        if max(q.shape[2], k.shape[2]) <= self.num_landmarks:
            return F.dropout(masked_softmax(q @ k.mT, keys), self.dropout, self.training) @ v
        read = seen.new_ones(q.shape[0], q.shape[2]) if self.spec.cross else seen
        (to_q, rows), (to_k, columns) = (_segments(mask, self.num_landmarks, q.dtype) for mask in (read, seen))
        q_landmarks = to_q @ q.masked_fill(~read[:, None, :, None], 0.0)
        k_landmarks = to_k @ k.masked_fill(~keys.mT, 0.0)
        # a landmark of no position is a row or column of zeros
        a = masked_softmax(q_landmarks @ k_landmarks.mT, rows.mT & columns)
        first = F.dropout(masked_softmax(q @ k_landmarks.mT, columns), self.dropout, self.training)
        third = masked_softmax(q_landmarks @ k.mT, rows.mT & keys)
        return first @ (pseudo_inverse(a, self.num_iterations) @ (third @ v))

    def _convolve(self, v: Tensor) -> Tensor:
        """Sum over neighbours, one kernel for all channels of a head: [B, S, G, D] -> [B, S, G, D]."""
        assert self.kernel is not None
        weight = wide(self.kernel)[:, None, :, None]
        padding = self.kernel.shape[1] // 2, 0
        return F.conv2d(v.transpose(1, 2), weight, padding=padding, groups=v.shape[2]).transpose(1, 2)


def pseudo_inverse(a: Tensor, num_iterations: int) -> Tensor:
    """[..., R, C] -> [..., C, R]; rows and columns of zeros stay out of it."""
    size = a.sum(-2).amax(-1) * a.sum(-1).amax(-1)  # |A|_1 |A|_inf of weights, each at least 0
    z = a.mT / size.clamp_min(1e-12)[..., None, None]
    eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
    for _ in range(num_iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def _segments(seen: Tensor, num_landmarks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The means over segments as a matrix [B, 1, R, S], and which segments hold a position [B, 1, 1, R]."""
    most = min(num_landmarks, seen.shape[1])
    count = seen.sum(1, keepdim=True)
    index = (seen.cumsum(1) - 1) * count.clamp(max=most) // count.clamp(min=1)
    member = (index[:, None] == torch.arange(most, device=seen.device)[:, None]) & seen[:, None]
    size = member.sum(-1, keepdim=True)
    return (member.to(dtype) / size.clamp(min=1))[:, None], (size > 0).mT[:, None]
