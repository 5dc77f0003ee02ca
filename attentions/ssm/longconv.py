"""Long convolution: a learned tap for every distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State
from attentions.dense._template import TokenMixer, hide
from attentions.linear._recurrence import masked, wide
from attentions.ssm._fft import by_distance, long_conv


@dataclass(kw_only=True)
class ValueHistory(State):
    """The values of the last L positions [B, <= L, M]."""

    values: Tensor


class LongConv(TokenMixer):
    """y_t = sum_{s <= t} K[t - s] (W x)_s: a convolution as long as the sequence, every channel with taps of its own.

    K has L taps per channel, L the slot's `max_length`; what lies further back than L - 1 positions is not read. In the
    template every channel is a head with a Toeplitz matrix, which does not depend on the input. All positions at once
    by FFT; decoding keeps the values. Noncausal: a second kernel for later positions. A masked position is a zero
    input. It has no heads. L M parameters (noncausal: twice that) and M^2: 1.25 times softmax's (2.25) at M = 32 and
    L = 128.

    Source: the unified view of https://arxiv.org/abs/2302.06218, where such a matrix stands for long convolutions; not
    confirmed from the paper's text, so a kernel per channel, its start, one projection and no gate are ours. Taps start
    from N(0, 1 / L).
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a kernel needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2302.06218"
    complexity = "T log T"

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        directions = 1 if spec.causal else 2
        self.kernel = nn.Parameter(torch.randn(directions, spec.dim, spec.max_length) * spec.max_length**-0.5)
        self.v_proj = nn.Linear(spec.dim, spec.dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return long_conv(masked(self.v_proj(self._source(x, context)), key_mask), *self._taps(x.shape[1])).to(x.dtype)

    def matrix(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        taps = self._taps(x.shape[1])
        missing = x.shape[1] - taps[0].shape[-1]
        return hide(by_distance(*(nn.functional.pad(kernel, (0, missing)) for kernel in taps))[None], key_mask)

    def values(self, source: Tensor) -> Tensor:
        return self.v_proj(source)[..., None]

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return heads[..., 0].to(x.dtype)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        return ValueHistory(values=wide(self.kernel.new_empty(batch_size, 0, self.spec.dim)))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, ValueHistory)
        values = torch.cat([state.values, self.v_proj(x)], dim=1)[:, -self.kernel.shape[-1] :].clone()
        taps = wide(self.kernel[0, :, : values.shape[1]]).flip(-1)  # the last meets the current position
        output = (values * taps.mT).sum(1, keepdim=True).to(x.dtype)
        return output, ValueHistory(values=values, position=state.position + 1)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        values = wide(self.v_proj(x))[:, -self.kernel.shape[-1] :].clone()
        return self(x), ValueHistory(values=values, position=x.shape[1])

    def state_bytes(self, length: int) -> int:
        return 4 * min(length, self.kernel.shape[-1]) * self.spec.dim

    def _taps(self, length: int) -> list[Tensor]:
        """The kernels' first `length` taps [M, <= length]: on positions up to each, and noncausal on later ones."""
        return list(wide(self.kernel[..., :length]))
