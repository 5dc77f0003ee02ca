"""Blocks of keys compressed to one key each, and what attention to them says about blocks of another size.

Compressed block n covers the positions n * stride ... n * stride + size - 1 and exists when it is complete.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.sparse._selection import masked_softmax


class Compression(nn.Module):
    """phi: a block of vectors, each with a learned vector for its place added, through an MLP to one vector."""

    def __init__(self, dim: int, size: int, stride: int):
        super().__init__()
        self.size, self.stride = size, stride
        self.places = nn.Parameter(0.1 * torch.randn(size, dim))
        # plain parameters: a backbone that shrinks the weights of every nn.Linear would make all blocks alike
        self.inner = nn.Parameter(torch.randn(size * dim, dim) / math.sqrt(size * dim))
        self.outer = nn.Parameter(torch.randn(dim, dim) / math.sqrt(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of the complete blocks: [B, S, G, D] -> [B, N, G, D]; masked vectors count as zeros."""
        if x.shape[1] < self.size:
            return x[:, :0]
        blocks = x.unfold(1, self.size, self.stride).transpose(-1, -2) + self.places  # [B, N, G, size, D]
        if mask is not None:
            blocks = blocks.masked_fill(~mask.unfold(1, self.size, self.stride)[:, :, None, :, None], 0.0)
        return F.gelu(blocks.flatten(-2) @ self.inner) @ self.outer


def compressed_weights(
    q: Tensor, k: Tensor, size: int, stride: int, *, causal: bool, start: int = 0, key_mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) over the compressed blocks that end before or at a query: [B, G, H / G, T, N].

    Args:
        q: [B, T, H, K], from position `start` on; k: [B, N, G, K], compressed.
        causal: without it every block may be read.
        key_mask: [B, S] bool of the positions; a block without an unmasked one is not read.
    """
    queries = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4) * q.shape[-1] ** -0.5
    position = start + torch.arange(q.shape[1], device=q.device)[:, None]
    last = torch.arange(k.shape[1], device=q.device) * stride + size - 1
    visible = (last <= position) | (not causal)
    if key_mask is not None:
        visible = visible & any_in_block(key_mask, size, stride)[:, None, None, None]
    return masked_softmax(queries @ k.permute(0, 2, 3, 1)[:, :, None], visible)


def share_out(weights: Tensor, size: int, stride: int, select_block: int, num_blocks: int) -> Tensor:
    """From weights [..., N] on compressed blocks to scores [..., num_blocks] of blocks of `select_block` positions.

    A stride gets the weights of all compressed blocks that it is part of, a block those of its strides.

    Source: Yuan et al. 2025, https://arxiv.org/abs/2502.11089, eq. 9, which counts blocks from 1.
    """
    shares, strides = size // stride, select_block // stride
    padded = F.pad(weights, (shares - 1, num_blocks * strides - weights.shape[-1]))
    return padded.unfold(-1, shares, 1).sum(-1).unflatten(-1, (num_blocks, strides)).sum(-1)


def any_in_block(mask: Tensor, size: int, stride: int) -> Tensor:
    """Whether a complete block of mask [B, S] holds a True: [B, N]."""
    return mask.unfold(1, size, stride).any(-1) if mask.shape[1] >= size else mask[:, :0]


def in_blocks(x: Tensor, size: int) -> Tensor:
    """[B, S, ...] -> [B, ceil(S / size), size, ...], zeros behind the end."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % size)).unflatten(1, (-1, size))
