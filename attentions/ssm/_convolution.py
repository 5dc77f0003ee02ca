"""Depthwise convolution along the sequence, whole or one position at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv(nn.Module):
    """y_t = bias + sum_i weight[:, i] x_{t + i - offset}, each channel on its own; zeros outside the sequence.

    Causal: offset = kernel_size - 1, so weight[:, -1] meets the current position. Noncausal: the kernel is centred.

    Args:
        channels: C.
        kernel_size: positions seen, at least 1; odd when noncausal.
        causal: see positions <= t only.
        bias: add a bias per channel.

    Raises:
        ValueError: kernel_size below 1, or even in a noncausal convolution.
    """

    def __init__(self, channels: int, kernel_size: int, *, causal: bool = True, bias: bool = False):
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        if not causal and kernel_size % 2 == 0:
            raise ValueError(
                f"a noncausal kernel is centred, so kernel_size must be odd, got {kernel_size}; "
                f"nearest: {kernel_size - 1}, {kernel_size + 1}"
            )
        self.kernel_size = kernel_size
        self.causal = causal
        bound = kernel_size**-0.5  # what nn.Conv1d draws for one input channel per group
        self.weight = nn.Parameter(torch.empty(channels, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, tail: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; `tail` [B, kernel_size - 1, C] holds the inputs before x, None means zeros."""
        reach = self.kernel_size - 1
        if tail is not None:
            padded = torch.cat([tail, x], dim=1)
        else:
            padded = F.pad(x, (0, 0, reach, 0) if self.causal else (0, 0, reach // 2, reach // 2))
        length = x.shape[1]
        # shifted products: on a CPU several times faster than a grouped conv1d, whose layout is [B, C, T]
        output = padded[:, :length] * self.weight[:, 0]
        for i in range(1, self.kernel_size):
            output = torch.addcmul(output, padded[:, i : i + length], self.weight[:, i])
        return output if self.bias is None else output + self.bias

    def empty_tail(self, batch_size: int) -> Tensor:
        """The inputs before the first position: zeros [B, kernel_size - 1, C]."""
        return self.weight.new_zeros(batch_size, self.kernel_size - 1, self.weight.shape[0])

    def next_tail(self, x: Tensor, tail: Tensor) -> Tensor:
        """The tail after x [B, T, C]: the last kernel_size - 1 inputs."""
        inputs = torch.cat([tail, x], dim=1)
        return inputs[:, inputs.shape[1] - self.kernel_size + 1 :].clone()  # clone: a view would keep all inputs alive
