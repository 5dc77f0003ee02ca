"""From a task's inputs to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tasks.base import Tokens, Vectors

POSITIONS = ("none", "learned", "rotary")


class Embedding(nn.Module):
    """Token ids [B, L], or numbers [B, L, F] -> [B, L, M], plus a learned position where asked.

    Rotary positions live in the attention.

    Args:
        inputs: gives the vocabulary, or the number of values at a position, which a linear layer projects.
        length: longest input.
        dim: width M.
        positions: none, learned or rotary.
        dropout: after the sum.
        shared: embeddings of another stream, used instead of own ones.
    """

    def __init__(
        self,
        inputs: Tokens | Vectors,
        length: int,
        dim: int,
        positions: str,
        dropout: float,
        shared: nn.Module | None = None,
    ):
        super().__init__()
        own = nn.Linear(inputs.dim, dim) if isinstance(inputs, Vectors) else nn.Embedding(inputs.vocab_size, dim)
        if shared is not None and _size(shared) != _size(own):
            raise ValueError(
                f"inputs and context share an embedding and need one vocabulary, got {_size(shared)} and {_size(own)}"
            )
        self.tokens = own if shared is None else shared
        self.positions = nn.Embedding(length, dim) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, start: int = 0) -> Tensor:
        x = self.tokens(inputs)
        if self.positions is not None:
            end = start + inputs.shape[1]
            if end > self.positions.num_embeddings:
                raise ValueError(
                    f"learned positions end at {self.positions.num_embeddings}, asked for {end}; "
                    "use positions=rotary or none, or a task with longer inputs"
                )
            x = x + self.positions(torch.arange(start, end, device=inputs.device))
        return self.dropout(x)


def _size(embedding: nn.Module) -> str:
    """What an embedding takes, in words."""
    if isinstance(embedding, nn.Embedding):
        return str(embedding.num_embeddings)
    return f"{embedding.in_features} real numbers"
