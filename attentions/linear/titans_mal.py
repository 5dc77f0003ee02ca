"""Titans MAL: memory as layer."""

from __future__ import annotations

from torch import Tensor

from attentions.base import State
from attentions.linear.titans_mag import WindowedMemory, WindowedState


class MemoryAsLayer(WindowedMemory):
    """A neural memory, then a sliding window over what it gives: y = x~ + M(x~), o = window(y), with x~ = [P; x].

    Args:
        window: positions that the attention sees, own included.
        num_persistent: learned tokens P before the sequence.
        depth, momentum, chunk_size, conv_size: of the memory, see `TitansLMM`.

    Source: Behrouz et al. 2024, https://arxiv.org/abs/2501.00663, section 4.3, eq. 29 to 31. Differs: eq. 30 has no
    x~ +, while section 4.4 says that every block has a residual connection. The paper's experiments put the memory into
    a layer like H3's; their window is 2048 and P = 128 (NeurIPS 2025 version, appendix E.1). Noncausal: the window
    looks both ways and the memory learns from either end, ours.
    """

    def meet(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.window(x + self.memory(x, key_mask=key_mask), key_mask=key_mask)

    def meet_step(self, x: Tensor, state: WindowedState) -> tuple[Tensor, State, State]:
        y, memory = self.memory.step(x, state.memory)
        o, window = self.window.step(x + y, state.window)
        return o, memory, window
