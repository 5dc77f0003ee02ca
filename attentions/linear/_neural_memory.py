"""The neural memory of Titans: a small network without biases that learns by gradient descent while it reads.

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2      M_t = (1 - alpha_t) M_{t-1} + S_t      y_t = M_t(q_t)

S, the surprise, is a momentum. M is a matrix, or an MLP x + g LN(GELU(x W_1) W_2) or deeper, whose matrices learn while
it reads; g does not. Gradients are taken at the weights M_0 that a chunk of positions starts with, so inside it S and M
are linear recurrences with known inputs, and the gradient of a layer at position j is an outer product x_j d_j^T of
what enters the layer and its error. Therefore

    M_i = beta_i M_0 + f_i S_0 - sum_{j <= i} G_ij x_j d_j^T          beta_i = prod_{l <= i} (1 - alpha_l)
    f_i = sum_{r <= i} (beta_i / beta_r) m_r                          m_r = prod_{l <= r} eta_l
    G_ij = sum_{j <= r <= i} (beta_i / beta_r) n_rj                   n_rj = theta_j prod_{j < l <= r} eta_l

for every layer: products of [C, C] with [C, D], and never a copy of the weights per position.

Source: Behrouz et al. 2024, https://arxiv.org/abs/2501.00663, eq. 12 to 18; f and G are worked out here, where the
paper scans. Differs: eq. 17 drops the 2 that eq. 12 has in its gradient, kept here; quotients are exp of differences of
logarithms, so nothing is divided by a product that has vanished; matrices act from the right.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import State
from attentions.linear._recurrence import masked, wide

Layers = tuple[Tensor, ...]  # one tensor for each layer of the memory
S = TypeVar("S", bound="NeuralState")


@dataclass(kw_only=True)
class NeuralState(State):
    """Weights [B, G, K, V] of every layer, now and at the start of the chunk, and surprise; () where there is none."""

    weights: Layers
    start: Layers = ()
    surprise: Layers = ()


def predict(weights: Layers, q: Tensor, gain: Tensor | None = None) -> Tensor:
    """What a memory answers: q [B, T, H, K] -> [B, T, H, V]; `gain` as in `learn`."""
    asked = x = _rows(wide(q).transpose(1, 2)[:, :, None], weights[0].shape[1]).squeeze(2)
    for depth, weight in enumerate(weights):
        x = (F.gelu(x) if depth else x) @ weight
    x = _added(asked, x, gain)
    return x.unflatten(2, (-1, q.shape[1])).flatten(1, 2).transpose(1, 2).to(q.dtype)


def learn(
    state: S,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    *,
    step: Tensor,
    log_keep: Tensor,
    log_momentum: Tensor | None = None,
    key_mask: Tensor | None = None,
    chunk_size: int,
    gain: Tensor | None = None,
) -> tuple[Tensor, S]:
    """Learn S further positions, and read each with the weights after it.

    Args:
        state: its `position` says where in a chunk the first position falls.
        k: [B, S, G, K]; v: [B, S, G, V]; q: [B, S, H, K], or [B, 0, H, K] to read nothing.
        step, log_keep, log_momentum: theta, log(1 - alpha) and log eta, [B, S, G]; None: no momentum.
        key_mask: [B, S]; a masked position leaves M and S as they are, but counts as a place in its chunk.
        chunk_size: positions between two places where gradients are taken.
        gain: g [G, V] of an MLP with residual and LN; None: neither.

    Returns:
        [B, S, H, V] (or [B, 0, H, V]), and the state after the last position.
    """
    length, front, size = k.shape[1], state.position % chunk_size, chunk_size
    if front + length <= chunk_size:  # within one chunk: no padding
        front, size = 0, length
    present = key_mask
    if present is None and (front or length % size):
        present = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    k, v, step, log_keep = (_chunked(masked(wide(x), key_mask), front, size) for x in (k, v, step, log_keep))
    if log_momentum is not None:
        log_momentum = _chunked(masked(wide(log_momentum), key_mask), front, size)
    rates = _rates(step, log_keep, log_momentum, None if present is None else _chunked(present[..., None], front, size))
    start, before = state.start or state.weights, []
    for n in range(k.shape[2]):
        start = state.weights if n else start
        entering, errors = _gradients(start, k[:, :, n], v[:, :, n], gain)
        before.append((state.weights, state.surprise, entering, errors))
        state = _end(state, entering, errors, rates, n)
    stop = state.position + length
    state = dataclasses.replace(state, start=start if stop % chunk_size else state.weights, position=stop)
    if not q.shape[1]:
        return v.new_zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), state
    weights, surprise, entering, errors = (
        tuple(torch.stack(chunks, 2) for chunks in zip(*layers, strict=True)) for layers in zip(*before, strict=True)
    )
    repeats = 1, 1, 1, q.shape[2] // k.shape[1], 1
    keep, write = rates.keep.repeat(repeats), rates.write.repeat(repeats)
    asked = x = _rows(_chunked(wide(q), front, size), k.shape[1])
    for depth, weight in enumerate(weights):
        x = F.gelu(x) if depth else x
        z = keep * (x @ weight) - (write * (x @ entering[depth].mT)) @ errors[depth]
        x = z if rates.carry is None else z + rates.carry.repeat(repeats) * (x @ surprise[depth])
    heads = (
        _added(asked, x, gain).unflatten(3, (-1, size)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    )  # [B, H, front + S + .., V]
    return heads[:, :, front : front + length].transpose(1, 2).to(q.dtype), state


def _end(state: S, entering: Layers, errors: Layers, rates: _Rates, n: int) -> S:
    """Weights and surprise after chunk n."""
    keep, write = rates.keep[:, :, n, -1:], rates.write[:, :, n, -1, :, None]
    learned = tuple(x.mT @ (write * d) for x, d in zip(entering, errors, strict=True))
    weights = tuple(keep * w - new for w, new in zip(state.weights, learned, strict=True))
    if rates.carry is None or rates.push is None or rates.momentum is None:
        return dataclasses.replace(state, weights=weights)
    carry, momentum, push = rates.carry[:, :, n, -1:], rates.momentum[:, :, n, -1:], rates.push[:, :, n, -1, :, None]
    pushed = tuple(x.mT @ (push * d) for x, d in zip(entering, errors, strict=True))
    return dataclasses.replace(
        state,
        weights=tuple(w + carry * s for w, s in zip(weights, state.surprise, strict=True)),
        surprise=tuple(momentum * s - new for s, new in zip(state.surprise, pushed, strict=True)),
    )


@dataclass
class _Rates:
    """beta [.., C, 1] and G [.., C, C]; with momentum also f [.., C, 1], n [.., C, C] and m [.., C, 1]."""

    keep: Tensor
    write: Tensor
    carry: Tensor | None = None
    push: Tensor | None = None
    momentum: Tensor | None = None


def _rates(step: Tensor, log_keep: Tensor, log_momentum: Tensor | None, present: Tensor | None) -> _Rates:
    """From theta, log(1 - alpha), log eta and, where some are absent, which positions are present: [B, G, N, C]."""
    kept = _products(log_keep)
    if present is not None:
        kept = kept * present[..., None, :]  # an absent position adds no surprise
    keep = log_keep.cumsum(-1).exp()[..., None]
    if log_momentum is None:
        return _Rates(keep, kept * step[..., None, :])
    push = _products(log_momentum) * step[..., None, :]
    momentum = log_momentum.cumsum(-1).exp()[..., None]
    return _Rates(keep, kept @ push, kept @ momentum, push, momentum)


def _products(log: Tensor) -> Tensor:
    """prod_{j < l <= i} exp(log_l) for j <= i, else 0: [..., C] -> [..., C, C]."""
    total = log.cumsum(-1)
    future = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu(1)
    # masked before exp: a future difference is positive and may overflow
    return (total[..., :, None] - total[..., None, :]).masked_fill(future, -math.inf).exp()


def _gradients(weights: Layers, k: Tensor, v: Tensor, gain: Tensor | None) -> tuple[Layers, Layers]:
    """What enters every layer, and its error d, at each position: the gradient of |M(k) - v|^2 is x_j d_j^T."""
    entering, before = [k], []
    for weight in weights[:-1]:
        z = entering[-1] @ weight
        entering.append(F.gelu(z))
        before.append(z)
    y = entering[-1] @ weights[-1]
    if gain is None:
        errors = [2 * (y - v)]
    else:
        normed, scale = _normed(y)
        gain = gain[:, None]
        error = 2 * gain * (k + gain * normed - v)
        errors = [scale * (error - error.mean(-1, keepdim=True) - normed * (normed * error).mean(-1, keepdim=True))]
    for depth in range(len(before), 0, -1):
        z, error = before[depth - 1], errors[-1] @ weights[depth].mT
        slope = (1 + torch.erf(z / math.sqrt(2))) / 2 + z * (-z.square() / 2).exp() / math.sqrt(2 * math.pi)  # of GELU
        errors.append(error * slope)
    return tuple(entering), tuple(reversed(errors))


def _normed(y: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm of y in the last axis, without weights, and 1 / standard deviation."""
    y = y - y.mean(-1, keepdim=True)
    scale = (y.square().mean(-1, keepdim=True) + 0.1).rsqrt()  # with 1e-5 forgetting shrinks y until rounding decides
    return y * scale, scale


def _added(x: Tensor, y: Tensor, gain: Tensor | None) -> Tensor:
    """x + gain * LN(y) for x [B, G, .., V] and gain [G, V]; None: y."""
    return y if gain is None else x + gain.view(-1, *[1] * (x.dim() - 3), gain.shape[-1]) * _normed(y)[0]


def _chunked(x: Tensor, front: int, size: int) -> Tensor:
    """[B, S, G] or [B, S, G, D] -> [B, G, N, C] or [B, G, N, C, D], with `front` and what lacks at the end as zeros."""
    x, back = x.transpose(1, 2), -(front + x.shape[1]) % size
    if front or back:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (front, back))
    return x.unflatten(2, (-1, size))


def _rows(x: Tensor, groups: int) -> Tensor:
    """[B, H, N, C, K] -> [B, G, N, H / G * C, K]: the query heads of a group one under the other."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)


class MemoryGate(nn.Module):
    """An attention's output y gated by a memory's answer m, both [B, T, M]: norm(y) * SiLU(norm(m) + b).

    Source: Behrouz et al. 2024, https://arxiv.org/abs/2501.00663, section 4.2: both are normalised with learned
    weights, and a non-linearity follows. Differs: the paper says neither which nor on what. SiLU of the memory, ours,
    lets it change the sign and the size of y, where a sigmoid can only fade it and recalls less; b starts at one, so
    that y passes by a matrix that is still empty.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.memory_norm = nn.RMSNorm(dim, eps=1e-5)
        self.bias = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.attention_norm(y) * F.silu(self.memory_norm(m) + self.bias)
