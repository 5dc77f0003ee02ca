"""From a task's inputs to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tasks.base import Tokens

POSITIONS = ("none", "learned", "rotary")


class TokenEmbedding(nn.Module):
    """Token ids [B, L] -> [B, L, M], plus a learned position where asked; rotary positions live in the attention.

    Args:
        inputs: gives the vocabulary.
        length: longest input.
        dim: width M.
        positions: none, learned or rotary.
        dropout: after the sum.
        shared: token embeddings of another stream, used instead of own ones.
    """

    def __init__(
        self,
        inputs: Tokens,
        length: int,
        dim: int,
        positions: str,
        dropout: float,
        shared: nn.Embedding | None = None,
    ):
        super().__init__()
        if shared is not None and shared.num_embeddings != inputs.vocab_size:
            raise ValueError(
                f"inputs and context share an embedding and need one vocabulary, got {shared.num_embeddings} "
                f"and {inputs.vocab_size}"
            )
        self.tokens = nn.Embedding(inputs.vocab_size, dim) if shared is None else shared
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
