"""From a task's inputs to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tasks.base import TaskSpec

POSITIONS = ("none", "learned", "rotary")


class TokenEmbedding(nn.Module):
    """Token ids [B, L] -> [B, L, M], plus a learned position where asked; rotary positions live in the attention.

    Args:
        spec: gives the vocabulary and the longest input.
        dim: width M.
        positions: none, learned or rotary.
        dropout: after the sum.
    """

    def __init__(self, spec: TaskSpec, dim: int, positions: str, dropout: float):
        super().__init__()
        self.tokens = nn.Embedding(spec.inputs.vocab_size, dim)
        self.positions = nn.Embedding(spec.length, dim) if positions == "learned" else None
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
