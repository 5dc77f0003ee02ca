"""FNet: the Fourier transform as token mixing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern
from attentions.dense._template import TokenMixer, hide
from attentions.linear._recurrence import masked, wide


class FNet(TokenMixer):
    """Y = Re(F_T X F_M): the Fourier transform along the sequence of that along the channels. Nothing is learned.

    In the template: one head, M = F_T and W = F_M, both complex; the real part is taken at the end. A masked position
    is a zero input. It has no heads and no parameters.

    Args:
        orthonormal: divide both transforms by the square root of their length, so that the output is as large as the
            input; otherwise it is sqrt(T M) times as large.

    Source: Lee-Thorp et al. 2021, https://arxiv.org/abs/2105.03824, its Fourier sublayer (section not confirmed from
    the paper's text), one member of the unified view of https://arxiv.org/abs/2302.06218. Differs: masked positions are
    zeroed, and the transform can be orthonormal.
    """

    patterns = Pattern.NONCAUSAL_SELF
    impossible: ClassVar = {
        Pattern.CAUSAL_SELF: "a Fourier transform reads the whole sequence at every position",
        Pattern.CROSS: "queries do not enter a Fourier transform of the context, which has a length of its own",
    }
    paper = "https://arxiv.org/abs/2105.03824"
    complexity = "T log T"

    def __init__(self, spec: LayerSpec, *, orthonormal: bool = False):
        super().__init__(spec)
        self.norm = "ortho" if orthonormal else "backward"

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.fft.fft2(masked(wide(self._source(x, context)), key_mask), norm=self.norm).real.to(x.dtype)

    def matrix(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        identity = torch.eye(x.shape[1], dtype=wide(x).dtype, device=x.device)
        return hide(torch.fft.fft(identity, norm=self.norm)[None, None], key_mask)

    def values(self, source: Tensor) -> Tensor:
        return torch.fft.fft(wide(source), norm=self.norm)[:, :, None]

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return heads[:, :, 0].real.to(x.dtype)
