"""BiFormer's bi-level routing attention: regions choose regions, tokens read the tokens in them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.sparse._compression import any_in_block
from attentions.sparse._selection import Selection, largest, sparse_attention
from attentions.sparse.moba import BlockCache, MoBA
from attentions.ssm._convolution import DepthwiseConv

SCALES = ("full", "head")


class BiFormer(MoBA):
    """Softmax over the tokens of `top_k` regions, chosen by region for all heads at once, plus a local convolution.

        I_r = top_k over s of mean(q of r) . mean(k of s), over all heads      o = softmax(q k_I^T) v_I + LePE(v)

    Regions are a grid of num_regions x num_regions over an image (`spec.grid`), the last of an axis smaller where it
    does not divide, or blocks of `block_size` tokens on a line. LePE is a depthwise convolution of the values, 5 x 5 on
    an image, 5 on a line. No gradient reaches the choice.

    Causal (ours): the mean query of a block holds later tokens, so each token routes itself, to the complete blocks
    before it and always to its own, which it reads up to itself: MoBA with one choice for all heads. LePE looks back
    only. An image is read as a line. Cross (ours): each token routes itself to blocks of the context, a line; LePE is
    left out, as its neighbours are positions and queries have none there.

    Args:
        num_regions: S, regions on each axis of an image.
        block_size: tokens of a region on a line.
        top_k: regions read; causal, own included.
        lepe_kernel: width of LePE; 0 for none, odd when noncausal. It has (width^2 + 1) M parameters, on a line
            (width + 1) M.
        scale: of the scores; "full": M^-1/2, "head": D^-1/2.
        dropout, bias: as in softmax attention.

    Source: Zhu et al. 2023, https://arxiv.org/abs/2303.08810 (read through the authors' code,
    https://github.com/rayleizhu/BiFormer, whose scale of the full width is kept). S = 7; top_k is 1, 4, 16 and all over
    the four stages. Differs: regions that do not divide are cut at the end, as in its later version, but there are at
    most S on an axis; masked tokens count in no mean, and a region without an unmasked key is no candidate.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2303.08810"
    complexity = "T (top_k block_size + S / block_size^2); causal T (top_k block_size + S / block_size)"
    full_budget = staticmethod(lambda length: {"block_size": 4, "top_k": length, "lepe_kernel": 0, "scale": "head"})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        num_regions: int = 7,
        block_size: int = 64,
        top_k: int = 4,
        lepe_kernel: int = 5,
        scale: str = "full",
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, block_size=block_size, top_k=top_k, dropout=dropout, bias=bias)
        if num_regions < 1:
            raise ValueError(f"num_regions must be at least 1, got {num_regions}")
        if lepe_kernel < 0 or (lepe_kernel % 2 == 0 and lepe_kernel and not spec.causal):
            near = f"{max(0, lepe_kernel - 1)}, {max(0, lepe_kernel) + 1}"
            raise ValueError(
                f"lepe_kernel must be 0 or positive, odd when noncausal, got {lepe_kernel}; nearest: {near}"
            )
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale}")
        self.grid = None
        if spec.grid is not None and not spec.causal and not spec.cross:
            if len(spec.grid) != 2:
                raise ValueError(f"regions need a grid of rows and columns, got {spec.grid}")
            self.grid = spec.grid
            self.region = [math.ceil(size / num_regions) for size in spec.grid]  # rows, columns
            self.block_size = math.prod(self.region)
        self.factor = spec.num_heads**-0.5 if scale == "full" else 1.0  # on top of D^-1/2
        self.lepe: DepthwiseConv | nn.Conv2d | None = None
        width = spec.kv_heads * self.value_dim
        if lepe_kernel and not spec.cross:
            if self.grid is None:
                self.lepe = DepthwiseConv(width, lepe_kernel, causal=spec.causal, bias=True)
            else:
                self.lepe = nn.Conv2d(width, width, lepe_kernel, padding=lepe_kernel // 2, groups=width)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        if self.grid is not None and x.shape[1] != math.prod(self.grid):
            raise ValueError(f"a grid of {self.grid} needs {math.prod(self.grid)} positions, got {x.shape[1]}")
        source = self._source(x, context)
        k, v = self.key_value(source)
        # the class's own attend: one choice for all heads ties them together, so nothing listens to them apart
        return self.merge(x, BiFormer.attend(self, self.query(x), k, v, key_mask=key_mask))

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return super().query(x, start) * self.factor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        if self.spec.causal or self.spec.cross:
            heads = super().attend(q, k, v, key_mask=key_mask)
        else:
            heads = self._by_region(q, k, v, key_mask)
        return heads if self.lepe is None else heads + self._convolved(v, key_mask)

    def select(self, q: Tensor, means: Tensor, key_mask: Tensor | None, start: int = 0, size: int = 1) -> Selection:
        """The regions of each query, or mean query of `size` queries, chosen by all heads as one: [B, 1, N, top_k]."""
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            means = repeat_heads(means, self.spec.num_heads).flatten(2)
            gates = q.to(means.dtype).flatten(2) @ means.mT  # [B, N, regions]
            region = torch.arange(means.shape[1], device=q.device)
            causal = self.spec.pattern == Pattern.CAUSAL_SELF
            if causal:
                own = (start + torch.arange(q.shape[1], device=q.device))[:, None] // self.block_size
                gates = gates.masked_fill(region == own, math.inf).masked_fill(region > own, -math.inf)
            if key_mask is not None:
                padded = F.pad(key_mask, (0, -key_mask.shape[1] % self.block_size))
                kept = any_in_block(padded, self.block_size, self.block_size)
                gates = gates.masked_fill(~kept[:, None], -math.inf)
        blocks = largest(gates, self.top_k)[:, None]
        return Selection(blocks, self.block_size, size, causal=causal, start=start)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, BlockCache)
        heads = super().read(q, state)
        if not isinstance(self.lepe, DepthwiseConv):
            return heads
        return heads + self._convolved(state.v[:, -self.lepe.kernel_size :], None)[:, -1:]

    def _by_region(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Noncausal self-attention, a region of queries at a time."""
        if self.grid is not None:  # region by region instead of row by row, fillers where a region is cut
            length, order = q.shape[1], self._order(q.device)
            if len(order) > length or key_mask is not None:
                real = q.new_ones(q.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
                key_mask = F.pad(real, (0, 1))[:, order]
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, 1))[:, order] for x in (q, k, v))
        means = self.means(k, key_mask)
        selection = self.select(self.means(q, key_mask), means, key_mask, size=self.block_size)
        dropout = self.dropout if self.training else 0.0
        heads = sparse_attention(q, k, v, selection, key_mask=key_mask, dropout=dropout)
        return heads if self.grid is None else heads[:, order.argsort()[:length]]

    def _order(self, device: torch.device) -> Tensor:
        """Positions of an image region by region; where a region is cut, the number behind all positions."""
        assert self.grid is not None
        (rows, columns), (height, width) = self.grid, self.region
        row = torch.arange(math.ceil(rows / height) * height, device=device)[:, None]
        column = torch.arange(math.ceil(columns / width) * width, device=device)
        position = (row * columns + column).masked_fill((row >= rows) | (column >= columns), rows * columns)
        return position.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten()

    def _convolved(self, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """LePE of the values [B, S, G, V], zero where masked: [B, S, H, V]."""
        assert self.lepe is not None
        flat = (v if key_mask is None else v.masked_fill(~key_mask[..., None, None], 0.0)).flatten(2)
        if self.grid is None:
            output = self.lepe(flat)
        else:
            output = self.lepe(flat.mT.unflatten(2, self.grid)).flatten(2).mT
        return repeat_heads(output.unflatten(2, v.shape[2:]), self.spec.num_heads)
