"""From one state of the residual stream to a whole sequence."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tasks.base import Reconstruction, TaskSpec


class ReconstructionHead(nn.Module):
    """Logits at every position asked for, from the last unmasked state and the position's number alone.

    The state plus fixed sinusoids of the position goes through two layers of width M with GELU, normed before each.

    Source: Poli et al. 2024 (MAD), https://arxiv.org/abs/2403.17844, the decoder of the compression task as in the
    published code.

    Args:
        spec: gives the number of classes and the longest input.
        norm: of the stream, before the first layer; copies of it stand before the others.
        dim: width M.
    """

    def __init__(self, spec: TaskSpec, norm: nn.Module, dim: int):
        super().__init__()
        assert isinstance(spec.output, Reconstruction)
        inner, outer = copy.deepcopy(norm), copy.deepcopy(norm)
        self.hidden = nn.Sequential(norm, nn.Linear(dim, dim), nn.GELU(), inner, nn.Linear(dim, dim), nn.GELU(), outer)
        self.project = nn.Linear(dim, spec.output.num_classes)
        self.register_buffer("places", sinusoids(spec.length, dim), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        places: Tensor = self.get_buffer("places")
        wanted = places[None, : x.shape[1]] if positions is None else places[positions]
        return self.project(self.hidden(last_unmasked(x, key_mask) + wanted))


def last_unmasked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """The last row of x [B, L, M] that the mask [B, L] keeps -> [B, 1, M]."""
    if key_mask is None:
        return x[:, -1:]
    place = (key_mask * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
    return x[torch.arange(len(x), device=x.device), place][:, None]


def sinusoids(length: int, dim: int) -> Tensor:
    """[length, dim]: sines, then cosines of the position over wavelengths from 2 pi to 2 pi * 10000."""
    half = (dim + 1) // 2
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(half) / max(1, half - 1))
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim]
