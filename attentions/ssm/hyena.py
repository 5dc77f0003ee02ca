"""Hyena: long convolutions with an implicit filter, between gates."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.linear._recurrence import masked, wide
from attentions.ssm._convolution import DepthwiseConv
from attentions.ssm._fft import long_conv


@dataclass(kw_only=True)
class HyenaState(State):
    """All inputs of the long convolutions so far [B, T, order - 1, M], and the short one's tail [B, 2, 3 M]."""

    history: Tensor
    tail: Tensor


class ImplicitFilter(nn.Module):
    """A filter as a function of time: h(t) = window(t) * MLP(t, cos and sin of t), with sine activations.

    Time runs from 0 to 1 over `max_length` positions, whatever the length at hand, so a tap never changes its value.
    The window of channel c is exp(-alpha_c t), alpha from ln(100) / 1.5 to ln(100) / 0.3 in equal steps, in each of the
    directions anew.

    Args:
        channels: filters of one direction.
        max_length: positions that time 0 to 1 is laid over.
        filter_order: width of the MLP; emb_dim: numbers that describe a position, odd: t and (emb_dim - 1) / 2 waves.
        num_inner_layers: layers between the first and the last.
        sine_frequency: start of the sine's trained frequencies.
        num_directions: sets of filters with the same windows.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        *,
        filter_order: int,
        emb_dim: int,
        num_inner_layers: int,
        sine_frequency: float,
        num_directions: int = 1,
    ):
        super().__init__()
        self.max_length = max_length
        self.num_directions = num_directions
        self.num_waves = (emb_dim - 1) // 2
        sizes = [emb_dim, *[filter_order] * (num_inner_layers + 1), num_directions * channels]
        # parameters, not Linear layers: at frequency 1 a backbone's N(0, 0.02) would start every filter near zero
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            bound = fan_in**-0.5
            self.weights.append(torch.empty(fan_out, fan_in).uniform_(-bound, bound))
            if layer < len(sizes) - 2:
                self.biases.append(torch.empty(fan_out).uniform_(-bound, bound))
        self.frequency = nn.Parameter(torch.full((filter_order,), float(sine_frequency)))

    def forward(self, length: int) -> Tensor:
        """The first `length` taps, [num_directions * channels, length], at least float32."""
        if length > self.max_length:
            raise ValueError(f"the filter covers max_length={self.max_length} positions, got {length}")
        weights, biases = [wide(w) for w in self.weights], [wide(b) for b in self.biases]
        with torch.autocast(weights[0].device.type, enabled=False):
            like: dict[str, Any] = {"device": weights[0].device, "dtype": weights[0].dtype}
            position = torch.arange(length, **like)
            time = position[:, None] / max(1, self.max_length - 1)
            wave = torch.linspace(1e-4, self.num_waves - 1, self.num_waves, **like)  # one wave: 1e-4, as in the code
            angle = 2 * math.pi * position[:, None] / self.max_length * wave
            h = torch.cat([time, angle.cos(), -angle.sin()], dim=-1)
            for weight, bias in zip(weights, biases, strict=False):
                h = (wide(self.frequency) * F.linear(h, weight, bias)).sin()
            h = F.linear(h, weights[-1])
            channels = h.shape[-1] // self.num_directions
            decay = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, channels, **like)
            return (h * (-time * decay.repeat(self.num_directions)).exp()).mT


class Hyena(Attention):
    """Gates and long convolutions in turn: with v, x^1, ..., x^N projected from the input, z <- x^n * (h^n * z).

    The projections pass a short depthwise convolution; the filters h^n are implicit (`ImplicitFilter`) and each has a
    skip. With the published order 2: y = x^2 * (h * (x^1 * v) + d * (x^1 * v)), then a projection. A filter of
    this kind has no finite state: decoding keeps every input of the long convolutions, (order - 1) M numbers per
    position, and evaluates the filter anew. Noncausal: a second filter for later positions, and a centred short
    convolution, so kernel_size must be odd. A masked position adds nothing to either convolution. It has no heads.

    Parameters: 4 M^2 + 17 M, as softmax attention, plus the filter's network, 8640 + 64 M at the published sizes: 3.7
    times softmax at width 32, 1.8 at width 64, 1.3 at width 128.

    Args:
        order: N, at least 2; N - 1 long convolutions.
        conv_size: positions seen by the short convolution.
        filter_order, emb_dim, num_inner_layers, sine_frequency: the filter's network, see `ImplicitFilter`.

    Source: Poli et al. 2023, https://arxiv.org/abs/2302.10866, definition 3.1 and section 3.3; window, embedding,
    biases, skips, initialisation and defaults as in the authors' code (safari, one head and block). Differs: N counts
    as in that code, whose order 2 has one long convolution, N - 1, and no filter on v but the short one; the position
    embedding is fixed, as in the authors' recall runs, where the code's default trains it at a rate of 1e-5; the
    filter's network starts as in the code's layer, where the authors' language models redraw its weights from
    N(0, 0.02), and has the layer's learning rate and weight decay; the noncausal form is ours.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: "a filter needs a distance, and queries and context share no positions"}
    paper = "https://arxiv.org/abs/2302.10866"
    complexity = "order T log T"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        order: int = 2,
        conv_size: int = 3,
        filter_order: int = 64,
        emb_dim: int = 3,
        num_inner_layers: int = 2,
        sine_frequency: float = 1.0,
    ):
        super().__init__(spec)
        for name, value, least in (
            ("order", order, 2),
            ("filter_order", filter_order, 1),
            ("emb_dim", emb_dim, 3),
            ("num_inner_layers", num_inner_layers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if emb_dim % 2 == 0:
            raise ValueError(
                f"emb_dim must be odd (time, and a cosine and a sine per wave), got {emb_dim}; "
                f"nearest: {emb_dim - 1}, {emb_dim + 1}"
            )
        self.order, self.num_directions = order, 1 if spec.causal else 2
        self.in_proj = nn.Linear(spec.dim, (order + 1) * spec.dim)
        self.conv = DepthwiseConv((order + 1) * spec.dim, conv_size, causal=spec.causal, bias=True)
        self.filter = ImplicitFilter(
            spec.dim * (order - 1),
            spec.max_length,
            filter_order=filter_order,
            emb_dim=emb_dim,
            num_inner_layers=num_inner_layers,
            sine_frequency=sine_frequency,
            num_directions=self.num_directions,
        )
        self.skip = nn.Parameter(torch.randn(order - 1, spec.dim))
        self.out_proj = nn.Linear(spec.dim, spec.dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return self._run(masked(self.in_proj(x), key_mask), key_mask)[0]

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        history = wide(self.skip.new_empty(batch_size, 0, self.order - 1, self.spec.dim))
        return HyenaState(history=history, tail=self.conv.empty_tail(batch_size))

    def state_bytes(self, length: int) -> int:
        return 4 * (length * (self.order - 1) * self.spec.dim + self.conv.empty_tail(1).numel())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, HyenaState)
        u = self.in_proj(x).to(state.tail.dtype)
        *gates, z = self.conv(u, state.tail).chunk(self.order + 1, dim=-1)
        taps = self._filters(state.position + 1)[0].flip(-1)  # [order - 1, M, T]: the last meets the current position
        inputs = []
        for n, gate in enumerate(reversed(gates[1:])):
            z = wide(z) * wide(gate)
            inputs.append(torch.cat([state.history[:, :, n], z], dim=1))
            z = (inputs[n] * taps[n].mT).sum(1, keepdim=True) + z * wide(self.skip[n])
        tail = self.conv.next_tail(u, state.tail)
        output = self.out_proj((z * wide(gates[0])).to(x.dtype))
        return output, HyenaState(history=torch.stack(inputs, dim=2), tail=tail, position=state.position + 1)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        u = self.in_proj(x)
        output, inputs = self._run(u, None)
        tail = self.conv.next_tail(u, self.conv.empty_tail(len(x)).to(u.dtype))
        return output, HyenaState(history=torch.stack(inputs, dim=2), tail=tail, position=x.shape[1])

    def _filters(self, length: int) -> Tensor:
        """[directions, order - 1, M, length]."""
        taps = self.filter(length).unflatten(0, (self.num_directions, self.spec.dim, self.order - 1))
        return taps.transpose(1, 2)  # a channel's filters are neighbours, so each convolution has windows of all widths

    def _run(self, u: Tensor, key_mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """From projections [B, T, (order + 1) M] to outputs [B, T, M] and the inputs of each long convolution."""
        *gates, z = self.conv(u).chunk(self.order + 1, dim=-1)
        filters, inputs = self._filters(u.shape[1]), []
        for n, gate in enumerate(reversed(gates[1:])):
            z = masked(wide(z) * wide(gate), key_mask)
            inputs.append(z)
            z = long_conv(z, filters[0, n], None if self.num_directions == 1 else filters[1, n]) + z * wide(
                self.skip[n]
            )
        return self.out_proj((z * wide(gates[0])).to(u.dtype)), inputs
