"""No attention: the floor under every table."""

from __future__ import annotations

import torch
from torch import Tensor

from attentions.base import Attention, Pattern, State


class NoAttention(Attention):
    """Returns zeros: the block's residual stream passes unchanged, and no position learns of another.

    What a backbone scores with this row is what its other layers, its embeddings and the task's priors give.
    """

    patterns = Pattern.ALL
    paper = "control"
    complexity = "0"

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        return State()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.zeros_like(x), State(position=state.position + x.shape[1])

    def state_bytes(self, length: int) -> int:
        return 0
