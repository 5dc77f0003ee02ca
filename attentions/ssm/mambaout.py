"""MambaOut's gated CNN block: Mamba without the state-space model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, Factory, LayerSpec, Pattern, State
from attentions.linear._recurrence import masked
from attentions.ssm._convolution import DepthwiseConv


@dataclass(kw_only=True)
class GatedState(State):
    """The convolution's last inputs [B, kernel_size - 1, C], and the state of the mixer behind it, if there is one."""

    tail: Tensor
    mixer: State | None = None


class MambaOut(Attention):
    """W_2 (GELU(g) * [i, conv(c)]), with [g, i, c] = W_1 x: attention and MLP in one gate and one short convolution.

    g is `hidden` wide, c is the first `conv_ratio` M channels' worth of the other half, and i passes by the
    convolution. On a grid the noncausal convolution is kernel_size x kernel_size, else it runs along the line, to
    the left only in a causal slot. Positions reach kernel_size - 1 to one side, and no further.

    With a `mixer` inside, what the convolution gives goes on through it: mixer(SiLU(conv(c))), the token mixing of
    Mamba when the mixer is S6. So one block holds the published comparison, with and without the state-space model, and
    a backbone can hold the block around any mechanism (`backbone.block`).

    Parameters: about 8 M^2 at expansion 8/3, to stand for the 12 M^2 of attention and MLP, and twice attention alone.

    Args:
        kernel_size: positions seen by the convolution along an axis; odd when noncausal. 1: a gated MLP.
        expansion: `hidden` over M.
        conv_ratio: convolved channels over M.
        mixer: a mechanism over the convolved channels, as a factory; None: none, MambaOut itself.

    Source: Yu & Wang 2024 (MambaOut), https://arxiv.org/abs/2405.07992, the gated CNN block; sizes and biases as in the
    authors' code. Differs: LayerNorm and residual stand in the backbone; the forms along a line are ours.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a kernel needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2405.07992"
    complexity = "T kernel_size"
    line: DepthwiseConv
    plane: PlaneConv | None
    mixer: Attention | None

    def __init__(
        self,
        spec: LayerSpec,
        *,
        kernel_size: int = 7,
        expansion: float = 8 / 3,
        conv_ratio: float = 1.0,
        mixer: Factory | None = None,
    ):
        super().__init__(spec)
        hidden, channels = int(expansion * spec.dim), int(conv_ratio * spec.dim)
        if not 1 <= channels <= hidden:
            raise ValueError(
                f"conv_ratio must lie between 1 / dim and expansion, got {conv_ratio} with dim={spec.dim} and "
                f"expansion={expansion}; published: 1.0 and 8/3"
            )
        self.sizes = [hidden, hidden - channels, channels]
        self.fc1 = nn.Linear(spec.dim, 2 * hidden)
        plane = spec.grid is not None and len(spec.grid) == 2 and not spec.causal
        self.plane = PlaneConv(channels, kernel_size) if plane else None
        if not plane:
            self.line = DepthwiseConv(channels, kernel_size, causal=spec.causal, bias=True)
        self.mixer = None if mixer is None else mixer(dataclasses.replace(spec, dim=channels))
        self.fc2 = nn.Linear(hidden, spec.dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        g, i, c = self.fc1(self._source(x, context)).split(self.sizes, dim=-1)
        c = masked(c, key_mask)
        c = self.line(c) if self.plane is None else self.plane(c, self.spec.grid or ())
        if self.mixer is not None:
            c = self.mixer(F.silu(c), key_mask=key_mask)
        return self._gate(g, i, c)

    def init_state(
        self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> GatedState:
        inner = None if self.mixer is None else self.mixer.init_state(batch_size)
        return GatedState(tail=self.line.empty_tail(batch_size), mixer=inner)

    def state_bytes(self, length: int) -> int:
        inner = 0 if self.mixer is None else self.mixer.state_bytes(length)
        return 4 * self.line.empty_tail(1).numel() + inner

    def step(self, x: Tensor, state: State) -> tuple[Tensor, GatedState]:
        assert isinstance(state, GatedState)
        g, i, u = self.fc1(x).split(self.sizes, dim=-1)
        c, inner = self.line(u, state.tail), state.mixer
        if self.mixer is not None and inner is not None:
            c, inner = self.mixer.step(F.silu(c), inner)
        tail = self.line.next_tail(u, state.tail)
        return self._gate(g, i, c), GatedState(tail=tail, mixer=inner, position=state.position + 1)

    def _gate(self, g: Tensor, i: Tensor, c: Tensor) -> Tensor:
        return self.fc2(F.gelu(g) * torch.cat([i, c], dim=-1))


class GatedMLP(MambaOut):
    """MambaOut without its convolution, W_2 (GELU(g) * i): the control that mixes no positions.

    Args:
        expansion: hidden width over M.

    Source: as MambaOut; the block with a kernel of one position, a scale and a shift per channel, for a token mixer.
    """

    patterns = Pattern.SELF
    paper = "control"
    complexity = "T"

    def __init__(self, spec: LayerSpec, *, expansion: float = 8 / 3):
        super().__init__(spec, kernel_size=1, expansion=expansion)


class PlaneConv(nn.Module):
    """A depthwise convolution over rows and columns, centred, zeros outside the image, with a bias per channel.

    Args:
        channels: C.
        kernel_size: pixels seen along each axis, odd.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"a noncausal kernel is centred, so kernel_size must be odd, got {kernel_size}; "
                f"nearest: {max(1, kernel_size - 1)}, {kernel_size + 1}"
            )
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, T, C] -> [B, T, C] with T = rows * columns, read row by row."""
        rows, columns = grid
        if x.shape[1] != rows * columns:
            raise ValueError(f"the slot's grid is {rows} x {columns}, got a sequence of {x.shape[1]} positions")
        return self.conv(x.mT.unflatten(2, (rows, columns))).flatten(2).mT
