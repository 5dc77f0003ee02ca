"""Convolution with a kernel as long as the sequence, through the FFT."""

from __future__ import annotations

import torch
from torch import Tensor

from attentions.linear._recurrence import wide


def long_conv(u: Tensor, kernel: Tensor, backward: Tensor | None = None) -> Tensor:
    """y_t = sum_{s <= t} kernel[t - s] u_s + sum_{s > t} backward[s - t - 1] u_s, zeros outside the sequence.

    The FFT is padded to twice the sequence, so the circle never wraps. It rounds relative to the loudest position of
    a channel, later ones included: 1e-7 of it in float32, which is noise and no information about the future.

    Args:
        u: [B, T, ...].
        kernel: taps by distance on the last axis, [..., L] with L <= T; the others broadcast against those of u.
        backward: taps on later positions, at most T - 1 of which count; the first meets the next position.

    Returns:
        [B, T, ...], at least float32.
    """
    length = u.shape[1]
    kernel = wide(kernel)
    with torch.autocast(u.device.type, enabled=False):
        size = _fast_size(2 * length - 1)
        taps = torch.fft.rfft(kernel, size)
        if backward is not None:  # at distance -1, -2, ...: the end of the circle, read from behind
            taps = taps + _at_negative_distances(torch.fft.rfft(wide(backward)[..., : length - 1], size), size)
        spectrum = torch.fft.rfft(wide(u).movedim(1, -1), size) * taps
        return torch.fft.irfft(spectrum, size)[..., :length].movedim(-1, 1)


def by_distance(kernel: Tensor, backward: Tensor | None = None) -> Tensor:
    """The matrix that `long_conv` multiplies with: [..., L] -> [..., L, L], entry (t, s) the tap at distance t - s."""
    length = kernel.shape[-1]
    later = torch.zeros_like(kernel) if backward is None else backward
    taps = torch.cat([kernel.flip(-1), later[..., : length - 1]], dim=-1)  # from distance L - 1 down to -(L - 1)
    return taps.unfold(-1, length, 1).flip(-2)


def _at_negative_distances(spectrum: Tensor, size: int) -> Tensor:
    """From the spectrum of taps at 0, 1, ... that of the same taps at -1, -2, ...: time reversed, one step earlier."""
    step = torch.arange(spectrum.shape[-1], device=spectrum.device, dtype=spectrum.real.dtype)
    return spectrum.conj() * torch.polar(torch.ones_like(step), 2 * torch.pi * step / size)


def _fast_size(size: int) -> int:
    """The next size that an FFT likes: a power of two times 1, 3, 5 or 9."""
    return min(factor << max(0, -(-size // factor) - 1).bit_length() for factor in (1, 3, 5, 9))
