"""The selective scan: a diagonal recurrence whose decay and input change with the position.

    h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] u_t[d]      y_t[d] = sum_n C_t[n] h_t[d, n]

Source: Gu & Dao 2023 (Mamba), https://arxiv.org/abs/2312.00752, algorithm 2 and section 3.3; A held between samples and
B by the Euler rule, as in the authors' code. Differs: inside a segment the scan has two levels, about 2 sqrt(length)
steps over all sequences and chunks at once, where the paper has a tree. As in the authors' kernel, no states are
kept for the gradient, which computes them again from the start of each segment.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, segment_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """All outputs and the last state, from an empty one.

    Args:
        u, dt: [B, T, D], inputs and step sizes; dt = 0 leaves the state as it is.
        a: [D, N], below 0.
        b, c: [B, T, N], what is written along and read along.
        segment_size: most positions whose states [B, T, D, N] are held at once; the result does not depend on it.
            None: 16 to 256, about a million numbers, which fit a cache.

    Returns:
        y [B, T, D] and h [B, D, N].
    """
    if segment_size is None:
        segment_size = min(256, max(16, 2**20 // (len(u) * a.numel())))
    return _SelectiveScan.apply(u, dt, a, b, c, segment_size)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, segment_size: int
    ) -> tuple[Tensor, Tensor]:
        starts, outputs = [u.new_zeros(len(u), *a.shape)], []
        for part in _segments(u.shape[1], segment_size):
            _, states = _states(starts[-1], u[:, part], dt[:, part], a, b[:, part])
            outputs.append(_contract(states, c[:, part, :, None]))
            starts.append(states[:, -1].clone())  # clone: a view would keep all states alive
        ctx.save_for_backward(u, dt, a, b, c, *starts[:-1])
        ctx.segment_size = segment_size
        return torch.cat(outputs, dim=1), starts[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, a, b, c, *starts = ctx.saved_tensors
        grad_a = torch.zeros_like(a)
        parts = []
        for start, part in zip(reversed(starts), reversed(_segments(u.shape[1], ctx.segment_size)), strict=True):
            u_s, dt_s, b_s, c_s, grad_s = (x[:, part] for x in (u, dt, b, c, grad_y))
            length = u_s.shape[1]
            keep, states = _states(start, u_s, dt_s, a, b_s)
            # gradients of the states: the same recurrence from the end, g_t = C_t grad_t + keep_{t+1} g_{t+1}
            grads = F.pad(grad_s, (0, 0, 0, keep.shape[1] - length))[..., None] * _padded(c_s, keep)[:, :, None]
            grads[:, -1] += grad_state
            grads = _recur(torch.cat([keep[:, 1:], keep[:, :1]], dim=1), grads, _chunk(length), backwards=True)
            grad_state = keep[:, 0] * grads[:, 0]
            written = _contract(grads, _padded(b_s, keep)[..., None])[:, :length]  # gradient of dt u
            read = (states[:, :length].mT @ grad_s[..., None])[..., 0]
            along = (grads[:, :length].mT @ (dt_s * u_s)[..., None])[..., 0]
            grads[:, 1:] *= states[:, :-1]
            grads[:, 0] *= start
            grads *= keep  # gradient of dt a
            grads = grads[:, :length]
            grad_a += torch.einsum("btdn,btd->dn", grads, dt_s)
            parts.append((written * dt_s, written * u_s + torch.einsum("btdn,dn->btd", grads, a), along, read))
        grad_u, grad_dt, grad_b, grad_c = (torch.cat(x[::-1], dim=1) for x in zip(*parts, strict=True))
        return grad_u, grad_dt, grad_a, grad_b, grad_c, None


def _segments(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _padded(x: Tensor, like: Tensor) -> Tensor:
    """Zeros behind the end, up to the length of `like`."""
    return F.pad(x, (0, 0, 0, like.shape[1] - x.shape[1]))


def _contract(states: Tensor, along: Tensor) -> Tensor:
    """[B, T', D, N] with [B, T, N, 1], T <= T', to [B, T, D]."""
    return (states[:, : along.shape[1]] @ along)[..., 0]


def _states(state: Tensor, u: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states [B, T', D, N] after a state; T' is T made up to whole chunks, in which nothing happens."""
    size = _chunk(u.shape[1])
    u, dt, b = (F.pad(x, (0, 0, 0, -u.shape[1] % size)) for x in (u, dt, b))
    keep = (dt[..., None] * a).exp_()
    states = (dt * u)[..., None] * b[:, :, None]
    states[:, 0].addcmul_(keep[:, 0], state)
    return keep, _recur(keep, states, size)


def _chunk(length: int) -> int:
    return math.isqrt(length - 1) + 1


def _recur(keep: Tensor, states: Tensor, size: int, *, backwards: bool = False) -> Tensor:
    """s_t += keep_t s_{t-1} in place, or with s_{t+1} backwards; [B, T, D, N] in chunks of `size`.

    First within all chunks at once, then from the end of each chunk into the whole next one.
    """
    chunks, kept = states.unflatten(1, (-1, size)), keep.unflatten(1, (-1, size)).clone()
    inner, outer = list(range(size)), list(range(chunks.shape[1]))
    if backwards:
        inner, outer = inner[::-1], outer[::-1]
    for before, i in itertools.pairwise(inner):
        chunks[:, :, i].addcmul_(kept[:, :, i], chunks[:, :, before])
        kept[:, :, i].mul_(kept[:, :, before])
    for before, n in itertools.pairwise(outer):
        chunks[:, n].addcmul_(kept[:, n], chunks[:, before, inner[-1:]])
    return states
