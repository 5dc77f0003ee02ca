"""The diagonal state-space model: its kernel, its state, and the steps between."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attentions.linear._recurrence import wide
from attentions.ssm._fft import long_conv

INITS = ("lin", "inv", "legs")


class DiagonalSSM(nn.Module):
    """x' = A x + u, y = C x, with A diagonal and complex, sampled every dt and held between samples (ZOH), per channel.

        x_t = exp(dt A) x_{t-1} + u_t      y_t = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n x_{t,n} + D u_t

    As a convolution, K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l). Half of the state's N numbers are
    kept, the others being their conjugates. B is 1: only its product with C matters. Re A = -exp(.) stays negative.

    Args:
        channels: C; each has its own A, C, dt and D.
        state_dim: N, even.
        init: of A_n, n < N/2, all with real part -1/2. lin: imaginary part pi n. inv: (N / pi) (N / (2n + 1) - 1).
            legs: eigenvalues of the normal part of HiPPO-LegS; B starts at 1 here too, as in the H3 authors' code,
            where the S4 authors' starts at HiPPO's own (of size 0.6 to 2 at N = 64).
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        causal: otherwise a second C reads a state that runs backwards and has seen the later positions.

    Raises:
        ValueError: state_dim odd or below 2, an unknown init, or not 0 < dt_min <= dt_max.

    Source: Gu et al. 2022 (S4D), https://arxiv.org/abs/2206.11893, sections 3 and 4; the backward direction, with A and
    dt shared and its first tap on the next position, is that of the authors' S4 layer.
    """

    def __init__(
        self,
        channels: int,
        *,
        state_dim: int = 64,
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        causal: bool = True,
    ):
        super().__init__()
        if state_dim < 2 or state_dim % 2:
            near = max(2, state_dim - 1)
            raise ValueError(
                f"state_dim counts conjugate pairs, so it must be even and positive, got {state_dim}; "
                f"nearest: {', '.join(map(str, sorted({near, max(2, state_dim + 1)})))}"
            )
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}; nearest: 'lin'")
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"0 < dt_min <= dt_max must hold, got dt_min={dt_min} and dt_max={dt_max}; nearest: 0.001, 0.1"
            )
        shape = channels, state_dim // 2
        self.causal = causal
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_decay = nn.Parameter(torch.full(shape, math.log(0.5)))  # log(-Re A)
        self.frequency = nn.Parameter(_frequencies(init, state_dim).repeat(channels, 1))  # Im A
        self.C = nn.Parameter(torch.randn(1 if causal else 2, *shape, 2) / math.sqrt(2))  # real and imaginary part
        self.D = nn.Parameter(torch.randn(channels))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """dt A [C, N/2] and C (exp(dt A) - 1) / A [directions, C, N/2], complex."""
        a = torch.complex(-wide(self.log_decay).exp(), wide(self.frequency))
        rate = wide(self.log_dt).exp()[:, None] * a
        return rate, torch.view_as_complex(wide(self.C)) * torch.expm1(rate) / a

    def kernels(self, length: int) -> Tensor:
        """K [directions, C, length] by distance, without D."""
        rate, output = self.discrete()
        # exp(rate (a c + b)) = exp(rate a c) exp(rate b): a matrix product in place of most exponentials
        size = math.isqrt(length - 1) + 1
        fine = torch.arange(size, device=rate.device)
        coarse = torch.arange(0, length, size, device=rate.device)
        left = output[..., None, :] * (coarse[:, None] * rate[:, None]).exp()
        return 2 * (left @ (rate[..., None] * fine).exp()).real.flatten(-2)[..., :length]

    def forward(self, u: Tensor) -> Tensor:
        """[B, T, C, ...] -> the same shape, at least float32; channel c acts on all that lies behind it."""
        kernels = self.kernels(u.shape[1])[(...,) + (None,) * (u.dim() - 3) + (slice(None),)]
        return self.skip(u) + long_conv(u, kernels[0], None if self.causal else kernels[1])

    def skip(self, u: Tensor) -> Tensor:
        """D u, the part of the own position that does not pass through the state: u [B, T, C, ...]."""
        return wide(u) * wide(self.D)[(...,) + (None,) * (u.dim() - 3)]

    def empty_state(self, batch_size: int, *inner: int) -> Tensor:
        """Zeros [B, C, ..., N/2], complex."""
        like = wide(self.log_decay)
        return like.new_zeros(batch_size, like.shape[0], *inner, like.shape[1], dtype=torch.complex(like, like).dtype)

    def advance(self, state: Tensor, u: Tensor) -> Tensor:
        """The state [B, C, ..., N/2] after the inputs u [B, S, C, ...]."""
        length, u = u.shape[1], wide(u)
        rate, _ = self.discrete()
        ahead = torch.arange(length - 1, -1, -1, device=u.device)
        weights = torch.view_as_real((ahead[:, None, None] * rate).exp())  # [S, C, N/2, 2]: u is real
        with torch.autocast(u.device.type, enabled=False):
            written = torch.einsum("scnr,bsce->bcenr", weights, u.flatten(3) if u.dim() > 3 else u[..., None])
        keep = (length * rate).exp()[(slice(None),) + (None,) * (u.dim() - 3)]
        return keep * state + torch.view_as_complex(written.contiguous()).view(state.shape)

    def read(self, state: Tensor) -> Tensor:
        """2 Re C x, without D: [B, C, ..., N/2] -> [B, C, ...]."""
        _, output = self.discrete()
        return 2 * (state * output[0][(slice(None),) + (None,) * (state.dim() - 3)]).sum(-1).real


def _frequencies(init: str, state_dim: int) -> Tensor:
    """Imaginary parts of A_n for n < N/2."""
    n = torch.arange(state_dim // 2, dtype=torch.float64)
    if init == "lin":
        return (torch.pi * n).float()
    if init == "inv":
        return (state_dim / torch.pi * (state_dim / (2 * n + 1) - 1)).float()
    # HiPPO-LegS plus its rank-one term is -1/2 plus a skew matrix, with imaginary eigenvalues in pairs
    root = (2 * torch.arange(state_dim, dtype=torch.float64) + 1).sqrt()
    upper = (torch.outer(root, root) / 2).triu(1)
    return torch.linalg.eigvalsh(1j * (upper - upper.T))[state_dim // 2 :].float()
