"""Performer: softmax's kernel estimated by positive orthogonal random features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.linear._recurrence import Memory, Recurrent, scan, wide, write

NEVER = -1e30  # the exponent of a key that is not there; finite, so that differences are


@dataclass(kw_only=True)
class Scaled(Memory):
    """A memory in units of exp(peak): peak [B, G] is the largest exponent of any key written."""

    peak: Tensor


class Performer(Recurrent):
    """exp(q.k / sqrt(D)) estimated as phi(q).phi(k), phi(x) = exp(w.x' - |x'|^2 / 2) / sqrt(m), x' = x / D^(1/4).

    The m rows w are Gaussian in law and orthogonal within each block of D: random orthogonal directions with
    independent chi-distributed lengths. The mean over w is exactly softmax's kernel; features are positive, so weights
    are too. 1 / sqrt(m) and any factor common to all keys cancel in the normalised read.

    No exponential overflows, and nothing is added to it: a query's features are divided by their largest, keys by the
    running maximum over keys and features, whose steps are the recurrence's log decay. A maximum over the whole
    sequence would let later and masked keys push a weight below the smallest float. What cancels is not rounded away
    while a query's and a key's favourite features lie within 69 nats of each other (vectors of length 15 and scores of
    hundreds); beyond that a read fades to zero.

    Args:
        num_features: rows m; None means D ln D, rounded.
        redraw_every: draw new rows every so many forwards in training; 0: never. Rows and count are buffers.

    Source: Choromanski et al. 2020, https://arxiv.org/abs/2009.14794, FAVOR+, lemma 1 and section 2.4; the number of
    features in the order of theorem 4, redrawn at each forward as in the authors' JAX code. Differs: that code adds
    1e-6 to each feature and takes the maximum over all keys, where the estimator here is unaltered; its rows are drawn
    anew in evaluation too, ours are those of the last training step.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2009.14794"
    complexity = "T num_features"
    normalised = True
    projection: Tensor
    forwards: Tensor

    def __init__(self, spec: LayerSpec, *, num_features: int | None = None, redraw_every: int = 1):
        super().__init__(spec)
        if num_features is None:
            num_features = max(1, round(self.key_dim * math.log(self.key_dim)))
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if redraw_every < 0:
            raise ValueError(f"redraw_every must be at least 0 (never), got {redraw_every}")
        self.num_features = num_features
        self.redraw_every = redraw_every
        self.register_buffer("projection", orthogonal_gaussian(num_features, self.key_dim))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        if self.training and self.redraw_every:
            self._count_and_redraw()
        return super().forward(x, context, key_mask=key_mask)

    @torch.no_grad()
    def _count_and_redraw(self) -> None:
        # drawn each time and chosen on the device: looking at the count would wait for the GPU
        fresh = orthogonal_gaussian(self.num_features, self.key_dim, self.projection.device).to(self.projection.dtype)
        self.forwards = self.forwards + 1
        # new tensors: an earlier forward may still need the old rows for its backward
        self.projection = torch.where(self.forwards % self.redraw_every == 0, fresh, self.projection)

    def exponents(self, heads: Tensor) -> Tensor:
        """w.x' - |x'|^2 / 2 for every w: [..., K] -> [..., F]."""
        x = wide(heads) * self.key_dim**-0.25
        return x @ wide(self.projection).T - x.square().sum(-1, keepdim=True) / 2

    def features(self, heads: Tensor) -> Tensor:
        """A query's features, the largest 1."""
        exponents = self.exponents(heads)
        return (exponents - exponents.detach().amax(-1, keepdim=True)).exp()

    def _keys(self, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Exponents [B, S, G, F] and the largest of each key [B, S, G]."""
        exponents = self.exponents(k)
        if key_mask is not None:
            exponents = exponents.masked_fill(~key_mask[:, :, None, None], NEVER)
        return exponents, exponents.detach().amax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        if self.spec.pattern != Pattern.CAUSAL_SELF:
            return self.read(q, self.update(self.init_memory(k.shape[0], k), k, v, key_mask=key_mask))
        with torch.autocast(q.device.type, enabled=False):
            k, v, _ = self._prepare(k, v, key_mask, {})
            exponents, peaks = self._keys(k, key_mask)
            peaks = peaks.cummax(dim=1).values
            before, after = peaks[:, :-1], peaks[:, 1:]
            # a memory 200 nats down is gone, and an empty one has no scale: large steps would round small ones away
            steps = (before - after).clamp_min(-200).masked_fill(before == NEVER, 0.0)
            steps = torch.cat([torch.zeros_like(peaks[:, :1]), steps], dim=1)
            k = (exponents - peaks[..., None]).exp()
            k, v, steps = (repeat_heads(x, self.spec.num_heads) for x in (k, v, steps[..., None]))
            heads = scan(self.features(q), k, v, log_decay=steps, chunk_size=self.chunk_size)
            return self._normalise(heads).to(q.dtype)

    def init_memory(self, batch_size: int, like: Tensor) -> Scaled:
        memory = self.empty_memory(batch_size, like)
        return Scaled(memory=memory, peak=memory.new_full(memory.shape[:2], NEVER))

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Scaled:
        assert isinstance(state, Scaled)
        with torch.autocast(k.device.type, enabled=False):
            k, v, _ = self._prepare(k, v, key_mask, {})
            exponents, peaks = self._keys(k, key_mask)
            peak = torch.maximum(state.peak, peaks.amax(1))
            memory = state.memory * (state.peak - peak).exp()[..., None, None]
            memory = write(memory, (exponents - peak[:, None, :, None]).exp(), v)
        return Scaled(memory=memory, peak=peak, position=state.position + k.shape[1])

    def state_bytes(self, length: int) -> int:
        return 4 * self.spec.kv_heads * (self.num_features * (self.value_dim + 1) + 1)

    def _normalise(self, heads: Tensor) -> Tensor:
        return heads[..., :-1] / heads[..., -1:].clamp_min(1e-30)  # 69 nats below 1; nothing written: 0 / 1e-30


def orthogonal_gaussian(num_rows: int, dim: int, device: torch.device | None = None) -> Tensor:
    """[num_rows, dim]: each row a standard normal vector in law, rows of one block of `dim` orthogonal."""
    blocks = torch.randn(math.ceil(num_rows / dim), dim, dim, device=device)
    directions, upper = torch.linalg.qr(blocks)
    # QR fixes signs by convention; undone, the columns are uniform on the sphere
    directions = directions * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    lengths = torch.randn(num_rows, dim, device=device).norm(dim=-1, keepdim=True)
    return directions.mT.flatten(0, 1)[:num_rows] * lengths
