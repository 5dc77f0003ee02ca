"""From the residual stream to a task's output."""

from __future__ import annotations

from torch import Tensor, nn

from tasks.base import TaskSpec


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """Rows of x [B, L, M] at `positions` [B, P] -> [B, P, M]; all of them when None."""
    if positions is None:
        return x
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class TokenHead(nn.Module):
    """Final norm and projection to classes, of the labelled positions only.

    Normalising and projecting only what is scored is exact and saves most of the work at large vocabularies.

    Args:
        spec: gives the number of classes.
        dim: width M.
        tied: the embedding whose weight is shared, or None for a projection of its own.
    """

    def __init__(self, spec: TaskSpec, dim: int, tied: nn.Embedding | None):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, spec.output.num_classes, bias=False)
        if tied is not None:
            if tied.weight.shape != self.project.weight.shape:
                raise ValueError(
                    f"tied embeddings need as many classes as tokens, got {spec.output.num_classes} and "
                    f"{spec.inputs.vocab_size}; use tied_embeddings=false"
                )
            self.project.weight = tied.weight

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.project(self.norm(at_positions(x, positions)))
