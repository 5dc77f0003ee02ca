"""The recurrence whose transition is diagonal plus low rank: a decay per channel, and an erasure of its own keys.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T      o_t = S_t^T q_t      per head, S [K, V]

What is recalled, r_t = S_{t-1}^T a_t, is written back along b_t, so inside a chunk it solves a triangular system:
r_t depends on the memory before the chunk, on v and on r of earlier positions.

Source: Peng et al. 2025, https://arxiv.org/abs/2503.14456, section 4 (the transition); the chunked form follows that of
the delta rule, Yang et al. 2024, https://arxiv.org/abs/2406.06484, section 3, with a second stream of writes. Differs:
decays are divided out channel by channel, so that a chunk is matrix products only; hence the bound on g.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attentions.linear._recurrence import chunked, memories


def scan(
    memory: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    recall: Tensor,
    rewrite: Tensor,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Every output of a causal sequence that starts with a memory, and the memory at its end.

    Args:
        memory: [B, H, K, V].
        q, k: [B, T, H, K]; v: [B, T, H, V].
        log_decay: g, [B, T, H, K], in [-1, 0]: exp(chunk_size) must be far from the largest float32.
        recall, rewrite: a and b, [B, T, H, K].
        chunk_size: most positions of a chunk; the result does not depend on it.

    Returns:
        [B, T, H, V] and [B, H, K, V].
    """
    length = q.shape[1]
    num_chunks = math.ceil(length / chunk_size)
    q, k, v, g, a, b = (chunked(x, num_chunks) for x in (q, k, v, log_decay, recall, rewrite))
    size = q.shape[-2]
    total = g.cumsum(-2)
    a, q = a * (total - g).exp(), q * total.exp()
    writes = torch.cat([b, k], dim=-2)
    scores = torch.cat([a, q], dim=-2) @ (writes * (-total).exp().repeat(1, 1, 1, 2, 1)).mT
    past, present = scores.split(size, dim=-2)
    (recall_b, recall_k), (read_b, read_k) = past.split(size, dim=-1), present.split(size, dim=-1)
    right = torch.cat([recall_k.tril(-1) @ v, a], dim=-1)  # r = first + second S, S the memory before the chunk
    if size > 1:
        right = torch.linalg.solve_triangular(-recall_b.tril(-1), right, upper=False, unitriangular=True)
    r, w = right.split([v.shape[-1], k.shape[-1]], dim=-1)
    values, erased = torch.cat([r, v], dim=-2), torch.cat([-w, torch.zeros_like(k)], dim=-2)
    *before, memory = memories(memory, writes, values, erased, total.repeat(1, 1, 1, 2, 1))
    output = read_b.tril() @ r + read_k.tril() @ v + (q + read_b.tril() @ w) @ torch.stack(before, dim=2)
    return output.flatten(2, 3)[:, :, :length].transpose(1, 2), memory
