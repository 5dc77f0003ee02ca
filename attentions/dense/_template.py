"""Token mixing in one template, Y = M(X) (X W): the matrix of a mechanism, for whoever wants to look at it.

Source: He and Kabic 2023 (A Unified View of Long-Sequence Models), https://arxiv.org/abs/2302.06218; the template is
read in summary and its details are not confirmed from the paper's text. Differs: a matrix per head, as ours have.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from attentions.base import Attention


class TokenMixer(Attention):
    """A mechanism that is linear in its values once its matrix is known: forward = merge(x, matrix @ values).

    `forward` computes it without the matrix; `mixed` computes it with. They are equal.
    """

    @abstractmethod
    def matrix(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """M(X) [B or 1, H, T, S]; zero where a key is masked or may not be read."""

    @abstractmethod
    def values(self, source: Tensor) -> Tensor:
        """X W [B, S, H, V]."""

    @abstractmethod
    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        """From heads [B, T, H, V] back to the stream [B, T, M]."""

    def mixed(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """The output [B, T, M] through the matrix."""
        values = self.values(self._source(x, context))
        matrix = self.matrix(x, context, key_mask=key_mask).expand(x.shape[0], -1, -1, -1)
        return self.merge(x, torch.einsum("bhts,bshv->bthv", matrix, values.to(matrix.dtype)))


def hide(matrix: Tensor, key_mask: Tensor | None) -> Tensor:
    """M [B or 1, H, T, S] with zero columns where key_mask [B, S] is False."""
    return matrix if key_mask is None else matrix.masked_fill(~key_mask[:, None, None], 0.0)
