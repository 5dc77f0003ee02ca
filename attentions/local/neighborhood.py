"""Neighborhood attention: exactly `kernel` keys around every query, on a line or an image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State, repeat_heads
from attentions.dense.softmax import KVCache, Softmax
from attentions.sparse._selection import Selection, masked_softmax, sparse_attention


class Neighborhood(Softmax):
    """Softmax over the L nearest positions, every query over as many: at a border the window is shifted, not cut.

    With dilation d an axis falls into d residue classes; in its class of n positions, query i reads

        noncausal: start ... start + L - 1,  start = min(max(i - floor(L / 2), 0), n - L)
        causal: max(i - L + 1, 0) ... i

    On an image (`spec.grid`) a query reads the product of its windows on the axes, L_rows x L_columns keys; causal,
    those above and to the left, which are part of the raster past. Every sequence must fill the grid.
    Cross (ours): the window is centred where the query stands in the context, noncausal at i S / T. Causal cross must
    not know T: there it is i max_keys / max_length of the slot, and the last window behind that. The context is a line.

    Where a noncausal axis has fewer than L d positions, d becomes the largest dilation that leaves L of them, and with
    fewer than L positions all are read. Without a bias the cost is the window's; with one it is that of all scores.
    Decoding keeps the window: (L - 1) d + 1 positions on a line, (L_rows - 1) d rows and a window more on an image.

    Args:
        kernel: L, one number or one per axis.
        dilation: d, one number or one per axis.
        relative_bias: add a learned number per head and offset to the scores, H (2 L - 1) or H (2 L_rows - 1)
            (2 L_columns - 1) of them; causal, H L and H L_rows L_columns.
        dropout, bias: as in softmax attention.

    Source: Hassani et al. 2022, https://arxiv.org/abs/2204.07143 (kernel 7, relative bias); dilation: Hassani and Shi
    2022, https://arxiv.org/abs/2209.15001; causal axes: the NATTEN package, whose window rule this is.
    Differs: NATTEN refuses kernel * dilation > n, and its modules once padded such inputs with zero keys. It has no
    relative bias with causal axes, no cross-attention and a stride, which is left out. Masked keys shift no window.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2204.07143"
    complexity = "T kernel; T S with a relative bias"
    full_budget = staticmethod(lambda length: {"kernel": length, "dilation": 1, "relative_bias": False})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        kernel: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        relative_bias: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        self.grid = None if spec.cross else spec.grid
        axes = len(self.grid or (0,))
        sizes = []
        for name, value in (("kernel", kernel), ("dilation", dilation)):
            each = [value] * axes if isinstance(value, int) else list(value)
            if len(each) != axes:
                raise ValueError(f"{name} needs one number or {axes}, one per axis, got {len(each)}")
            if min(each) < 1:
                raise ValueError(f"{name} must be at least 1, got {min(each)}")
            sizes.append(each)
        self.kernel, self.dilation = sizes
        self.shifts = not (spec.causal and not spec.cross)  # at a border the window is shifted inwards
        self.reach = [2 * size - 1 if self.shifts else size for size in self.kernel]  # offsets along each axis
        if relative_bias:
            self.relative_bias = nn.Parameter(0.02 * torch.randn(spec.num_heads, math.prod(self.reach)))
        else:
            self.register_parameter("relative_bias", None)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        if self.grid is not None and x.shape[1] != math.prod(self.grid):
            raise ValueError(f"a grid of {self.grid} needs {math.prod(self.grid)} positions, got {x.shape[1]}")
        return super().forward(x, context, key_mask=key_mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        position = torch.arange(q.shape[1], device=q.device)
        return self._read(q, k, v, *self.neighbours(position, q.shape[1], k.shape[1]), key_mask)

    def neighbours(self, position: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
        """The keys of the queries at some positions and their offsets, as an index into the bias: [N, L] both.

        -1 for no key.
        """
        shape = self.grid or (num_keys,)
        if self.spec.cross:
            steps, places = (self.spec.max_keys, self.spec.max_length) if self.spec.causal else (num_keys, num_queries)
            position = (position * steps // places).clamp(max=num_keys - 1)
        keys = offsets = position.new_zeros(len(position), 1)
        for axis, (size, reach) in enumerate(zip(shape, self.reach, strict=True)):
            own = position // math.prod(shape[axis + 1 :]) % size
            at, offset = self._along(own, size, self.kernel[axis], self.dilation[axis])
            at, keys, offset, offsets = at[:, None], keys[..., None], offset[:, None], offsets[..., None]
            keys = (keys * size + at).masked_fill((keys < 0) | (at < 0), -1).flatten(1)
            offsets = (offsets * reach + offset).flatten(1)
        return keys, offsets

    def _along(self, own: Tensor, size: int, kernel: int, dilation: int) -> tuple[Tensor, Tensor]:
        """On one axis of `size` positions: keys of the positions `own`, and offsets from 0 to reach - 1: [N, L]."""
        if not self.shifts:
            offset = torch.arange(kernel, device=own.device)
            at = own[:, None] + dilation * (offset - kernel + 1)
            return at.masked_fill(at < 0, -1), offset.expand(len(own), -1)
        width = min(kernel, size)
        dilation = max(1, min(dilation, size // kernel))
        first, i = own % dilation, own // dilation
        count = (size - first + dilation - 1) // dilation  # positions in the residue class
        start = torch.minimum((i - width // 2).clamp_min(0), count - width)
        j = start[:, None] + torch.arange(width, device=own.device)
        return first[:, None] + j * dilation, j - i[:, None] + kernel - 1

    def _read(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, offsets: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.relative_bias is None:
            dropout = self.dropout if self.training else 0.0
            return sparse_attention(q, k, v, Selection(keys[None, None], 1), key_mask=key_mask, dropout=dropout)
        q, k, v = (repeat_heads(x, self.spec.num_heads).transpose(1, 2) for x in (q, k, v))
        biases = self.relative_bias[:, offsets]  # [H, N, L]
        column = (keys % (k.shape[2] + 1)).expand_as(biases)  # no key goes to an extra column at the end
        table = biases.new_zeros(*biases.shape[:2], k.shape[2] + 1).scatter(-1, column, biases)[..., :-1]
        visible = torch.zeros_like(table[:1], dtype=torch.bool)
        visible = F.pad(visible, (0, 1)).scatter(-1, column[:1], True)[..., :-1]
        if key_mask is not None:
            visible = visible & key_mask[:, None, None]
        weights = masked_softmax((q * q.shape[-1] ** -0.5) @ k.mT + table, visible)
        return (F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v).transpose(1, 2)

    # -- decoding: positions counted apart from the context in cross-attention -----------------------

    @property
    def _span(self) -> int:
        """Positions from the oldest that a causal window holds to the query's own, in raster order."""
        strides = [math.prod((self.grid or (1,))[axis + 1 :]) for axis in range(len(self.kernel))]
        reach = zip(self.kernel, self.dilation, strides, strict=True)
        return 1 + sum((kernel - 1) * dilation * stride for kernel, dilation, stride in reach)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        return dataclasses.replace(super().init_state(batch_size, context, key_mask=key_mask), position=0)

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        cache = super().update(state, k, v, key_mask=key_mask)
        if self.spec.cross or cache.k.shape[1] <= self._span:
            return cache
        # clone: a view would keep the dropped positions alive
        return dataclasses.replace(cache, k=cache.k[:, -self._span :].clone(), v=cache.v[:, -self._span :].clone())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.spec.cross:
            state = dataclasses.replace(state, position=state.position + 1)
        return super().step(x, state)

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if self.grid is not None:  # a prompt need not fill it
            return Attention.prefill(self, x, context, key_mask=key_mask)
        output, state = super().prefill(x, context, key_mask=key_mask)
        return output, dataclasses.replace(state, position=x.shape[1])

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        position = torch.tensor([state.position - 1], device=q.device)
        if self.spec.cross:
            return self._read(q, state.k, state.v, *self.neighbours(position, 1, state.k.shape[1]), state.mask)
        keys, offsets = self.neighbours(position, state.position, state.position)
        dropped = state.position - state.k.shape[1]
        return self._read(q, state.k, state.v, keys.masked_fill(keys < 0, dropped - 1) - dropped, offsets, None)

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length if self.spec.cross else min(length, self._span))
