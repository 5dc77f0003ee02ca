"""From the residual stream to a task's output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.backbones.reconstruction import ReconstructionHead
from bench.errors import UserError
from tasks.base import PerSequence, Reconstruction, TaskSpec, Values

POOLINGS = ("mean", "first", "last")


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """Rows of x [B, L, M] at `positions` [B, P] -> [B, P, M]; all of them when None."""
    if positions is None:
        return x
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class TokenHead(nn.Module):
    """Final norm and projection to classes, or to values, of the labelled positions only.

    Normalising and projecting only what is scored is exact and saves most of the work at large vocabularies.

    Args:
        spec: gives the number of classes or values.
        norm: of the stream, before the projection.
        dim: width M.
        tied: the embedding whose weight is shared, or None for a projection of its own.
    """

    def __init__(self, spec: TaskSpec, norm: nn.Module, dim: int, tied: nn.Module | None):
        super().__init__()
        self.norm = norm
        if isinstance(spec.output, Values):
            if tied is not None:
                raise ValueError("tied embeddings need classes and the task predicts values; use tied_embeddings=false")
            self.project = nn.Linear(dim, spec.output.num_values)
            return
        self.project = nn.Linear(dim, spec.output.num_classes, bias=False)
        if tied is not None:
            if not isinstance(tied, nn.Embedding):
                raise ValueError(
                    "tied embeddings need tokens and the task's inputs are values; use tied_embeddings=false"
                )
            if tied.weight.shape != self.project.weight.shape:
                raise ValueError(
                    f"tied embeddings need as many classes as tokens, got {spec.output.num_classes} and "
                    f"{tied.num_embeddings}; use tied_embeddings=false"
                )
            self.project.weight = tied.weight

    def forward(self, x: Tensor, positions: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        return self.project(self.norm(at_positions(x, positions)))


class Classifier(nn.Module):
    """x [..., dim] -> logits [..., C] by an MLP with ReLU; `widths`: of its hidden layers."""

    def __init__(self, dim: int, num_classes: int, widths: Sequence[int]):
        super().__init__()
        sizes = [dim, *widths]
        self.hidden = nn.ModuleList(nn.Linear(size, width) for size, width in itertools.pairwise(sizes))
        self.classes = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = layer(x).relu()
        return self.classes(x)


def check_widths(widths: Sequence[int]) -> None:
    """Raises UserError: not widths of hidden layers."""
    if any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in widths):
        raise UserError(f"backbone.head_widths must be whole numbers of at least 1, got {list(widths)}")


class SequenceHead(nn.Module):
    """One prediction [B, 1, C] for the whole sequence: pooled over its unmasked positions, normed and projected.

    Args:
        spec: gives the number of classes.
        norm: of the stream, before the projection.
        dim: width M.
        pooling: mean, first or last unmasked position.
        widths: of hidden layers of the projection.
    """

    def __init__(self, spec: TaskSpec, norm: nn.Module, dim: int, pooling: str, widths: Sequence[int] = ()):
        super().__init__()
        assert isinstance(spec.output, PerSequence)
        self.pooling = pooling
        self.norm = norm
        classes = spec.output.num_classes
        self.project = Classifier(dim, classes, widths) if widths else nn.Linear(dim, classes)

    def forward(self, x: Tensor, positions: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        seen = torch.ones_like(x[..., 0], dtype=torch.bool) if key_mask is None else key_mask
        if self.pooling == "mean":
            total = x.masked_fill(~seen[..., None], 0.0).sum(1, keepdim=True)
            pooled = total / seen.sum(1).clamp_min(1)[:, None, None]
        else:
            order = torch.arange(x.shape[1], device=x.device)
            order = order if self.pooling == "first" else order.flip(0)
            place = order.masked_fill(~seen, x.shape[1]).argmin(1, keepdim=True)
            pooled = at_positions(x, place)
        return self.project(self.norm(pooled))


def make_head(
    spec: TaskSpec,
    norm: nn.Module,
    dim: int,
    pooling: str,
    tied: nn.Module | None,
    widths: Sequence[int] = (),
) -> TokenHead | SequenceHead | ReconstructionHead:
    """The head of a task's output; where it reads a state rather than tokens, nothing is tied.

    Raises:
        UserError: hidden layers, and more than one label per sequence.
    """
    check_widths(widths)
    if widths and not isinstance(spec.output, PerSequence):
        raise UserError("backbone.head_widths needs a task with one label per sequence; type backbone.head_widths=[]")
    if isinstance(spec.output, Reconstruction):
        return ReconstructionHead(spec, norm, dim)
    if isinstance(spec.output, PerSequence):
        return SequenceHead(spec, norm, dim, pooling, widths)
    return TokenHead(spec, norm, dim, tied)
