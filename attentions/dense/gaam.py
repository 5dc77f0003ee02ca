"""GAAM, Gaussian adaptive attention: inputs weighted by how far they are from their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import Attention, LayerSpec, Pattern, State
from attentions.dense._gaussian import Gaussians
from attentions.linear._recurrence import wide

LEAST = -1e30  # the logarithm of no weight; minus infinity would have a NaN for gradient
CROSS = "it weights a sequence by its own statistics, and no query is compared with anything"


@dataclass(kw_only=True)
class RunningStatistics(State):
    """Sum and sum of squares of all inputs, and the logarithm of the summed weights; all [B, M]."""

    total: Tensor
    squares: Tensor
    log_norm: Tensor


class GAAM(Attention):
    """y_t = x_t w_t with w_t proportional to a Gaussian of x_t around the mean over time, each channel on its own.

    Noncausal: time is cut in `num_heads` pieces of T // num_heads positions (the last takes the rest), each with its
    mean, unbiased variance, Gaussians and weights, which sum to 1. Causal, ours: one piece, mean and variance of the
    positions up to t, w_t = g_t / sum_{s <= t} g_s with every g_s as it was at s, so the state is 3 M numbers. The
    first position, whose variance is undefined, has variance 1: with 0, an offset of 1e-4 would take all its weight.
    At the last position the statistics equal the noncausal ones, but not the normaliser, whose earlier terms used the
    statistics of their time. No token is compared with another: other positions enter through statistics alone, so
    recall is out of reach. 2 K num_heads parameters, no projections. A masked position counts nowhere.

    Args:
        num_heads: pieces of the time axis; causal: 1, as borders would depend on the length.
        num_gaussians: K.
        combine: product, or sum (ours), see `Gaussians`.

    Source: Ioannides et al. 2024, https://arxiv.org/abs/2401.11143, with the authors' code where `norm_axis` is time
    (equations not confirmed from the paper's text); the residual around it is the backbone's. Differs: log c is
    learned, where the code learns c, with the same start; the weights are normalised exactly, where the code clamps
    their sum, which many Gaussians make small, at 1e-8; padding is left out, where there it enters the statistics as
    zeros; a piece of one position has weight 1, where there it is undefined; a piece may be empty.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: CROSS}
    paper = "https://arxiv.org/abs/2401.11143"
    complexity = "T num_gaussians"

    def __init__(self, spec: LayerSpec, *, num_heads: int = 1, num_gaussians: int = 5, combine: str = "product"):
        super().__init__(spec)
        if spec.causal and num_heads != 1:
            raise ValueError(
                f"causal GAAM has one piece of time, as borders would depend on the length; num_heads must be 1, "
                f"got {num_heads}"
            )
        self.gaussians = Gaussians(num_heads, num_gaussians, combine)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return x * self.weights(self._source(x, context), key_mask).to(x.dtype)

    def weights(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """w [B, T, M], at least float32; noncausal: they sum to 1 over each piece, zero where masked."""
        seen = torch.ones_like(x[..., :1], dtype=torch.bool) if key_mask is None else key_mask[..., None]
        if self.spec.causal:
            return self._running(x, seen)
        heads = self.gaussians.offset.shape[0]
        sizes = [x.shape[1] // heads] * (heads - 1)
        parts, masks = (whole.split([*sizes, x.shape[1] - sum(sizes)], dim=1) for whole in (x, seen))
        pieces = enumerate(zip(parts, masks, strict=True))
        return torch.cat([self._piece(part, mask, head) for head, (part, mask) in pieces], dim=1)

    def _piece(self, x: Tensor, seen: Tensor, head: int) -> Tensor:
        x = wide(x).masked_fill(~seen, 0.0)
        count = seen.sum(1, keepdim=True)
        mean = x.sum(1, keepdim=True) / count.clamp_min(1)
        variance = (x - mean).masked_fill(~seen, 0.0).square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
        log_weights = self.gaussians(x, mean, variance, head).masked_fill(~seen, torch.finfo(x.dtype).min)
        return log_weights.softmax(1).masked_fill(~seen, 0.0)

    def _running(self, x: Tensor, seen: Tensor) -> Tensor:
        x = wide(x).masked_fill(~seen, 0.0)
        log_weights = self._log_weights(x, x.cumsum(1), x.square().cumsum(1), seen.cumsum(1))
        log_weights = log_weights.masked_fill(~seen, LEAST)
        before = F.pad(log_weights.logcumsumexp(1)[:, :-1], (0, 0, 1, 0), value=LEAST)  # of all earlier ones
        return (log_weights - before).sigmoid().masked_fill(~seen, 0.0)  # g / (g + before), without cancellation

    def _log_weights(self, x: Tensor, total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
        """Of x, under the statistics of sums over `count` positions."""
        mean = total / count.clamp_min(1)
        variance = (squares - total * mean).clamp_min(0.0) / (count - 1).clamp_min(1)
        return self.gaussians(x, mean, variance.masked_fill(count < 2, 1.0))

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        zeros = wide(self.gaussians.offset.new_zeros(batch_size, self.spec.dim))
        return RunningStatistics(total=zeros, squares=zeros, log_norm=zeros + LEAST)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, RunningStatistics)
        now = wide(x[:, 0])
        total, squares = state.total + now, state.squares + now.square()
        log_weight = self._log_weights(now, total, squares, torch.tensor(state.position + 1, device=x.device))
        log_norm = torch.logaddexp(state.log_norm, log_weight)
        output = x * (log_weight - log_norm).exp()[:, None].to(x.dtype)
        position = state.position + 1
        return output, RunningStatistics(total=total, squares=squares, log_norm=log_norm, position=position)

    def state_bytes(self, length: int) -> int:
        return 4 * 3 * self.spec.dim


class FeatureGAAM(Attention):
    """GAAM along the channels: y_t = x_t w_t with w_t Gaussian around the mean of token t's own channels.

    The channels are cut in `num_heads` pieces of M // num_heads (the last takes the rest), in which weights sum to 1.
    It moves nothing between positions, hence a control: what GAAM's weighting does by itself. Neither mask nor state.

    Args:
        num_heads: pieces of the channels; num_gaussians, combine: as in `GAAM`.

    Source: Ioannides et al. 2024, https://arxiv.org/abs/2401.11143, with the authors' code where `norm_axis` is the
    features. Differs: as in `GAAM`.
    """

    patterns = Pattern.SELF
    impossible: ClassVar = {Pattern.CROSS: CROSS}
    paper = "control"
    complexity = "T num_gaussians"

    def __init__(self, spec: LayerSpec, *, num_heads: int = 4, num_gaussians: int = 5, combine: str = "product"):
        super().__init__(spec)
        if num_heads > spec.dim:
            raise ValueError(f"num_heads must be at most dim, got num_heads={num_heads} and dim={spec.dim}")
        self.gaussians = Gaussians(num_heads, num_gaussians, combine)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return x * self.weights(self._source(x, context)).to(x.dtype)

    def weights(self, x: Tensor) -> Tensor:
        """w [B, T, M], at least float32, which sum to 1 over each piece of the channels."""
        heads = self.gaussians.offset.shape[0]
        sizes = [x.shape[2] // heads] * (heads - 1)
        weights = []
        for head, piece in enumerate(wide(x).split([*sizes, x.shape[2] - sum(sizes)], dim=2)):
            variance = piece.var(2, correction=min(1, piece.shape[2] - 1), keepdim=True)
            weights.append(self.gaussians(piece, piece.mean(2, keepdim=True), variance, head).softmax(2))
        return torch.cat(weights, dim=2)

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        return State()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self(x), State(position=state.position + x.shape[1])

    def state_bytes(self, length: int) -> int:
        return 0
