"""Verdicts of a check: its exceptions, its tolerances, and comparisons whose error says where and by how much."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXACT = 1e-9  # the same sums over partly other numbers: float64 rounding, nothing else
FORMS = 1e-6  # two forms of one formula in float64; a wrong form is off by more than 1e-3
FLOAT32 = 1e-5  # float32 rounds at 6e-8; two digits for cancellation in long sums
BFLOAT16 = 5e-2  # bfloat16 rounds at 4e-3: a dozen roundings in a row


class ContractError(AssertionError):
    """A mechanism breaks its contract; the message is one line."""


class NotApplicable(Exception):
    """The check has nothing to say about this mechanism; the message is the reason."""


def deviation(got: Tensor, expected: Tensor) -> Tensor:
    """Largest difference at each row and position [B, T], in units of the largest expected value; NaN counts as inf."""
    if got.shape != expected.shape:
        raise ContractError(f"shape {list(got.shape)} instead of {list(expected.shape)}")
    got, expected = got.detach(), expected.detach()
    difference = (got - expected).abs().nan_to_num(nan=torch.inf).flatten(2).amax(-1)
    return difference / expected.abs().max().clamp_min(1e-30)


def require_equal(got: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    """Raises ContractError: "<what>: differs by 3.1e-01 of the largest value, first at row 0, position 5"."""
    size = deviation(got, expected)
    if (wrong := ~(size <= tolerance)).any():
        row, position = min(wrong.nonzero().tolist(), key=lambda index: index[::-1])
        where = f"first at row {row}, position {position}"
        raise ContractError(
            f"{what}: differs by {size.max():.1e} of the largest value, {where} (allowed: {tolerance:.0e})"
        )


def require_different(got: Tensor, expected: Tensor, what: str) -> None:
    """Raises ContractError when the two agree to rounding."""
    if (deviation(got, expected) <= EXACT).all():
        raise ContractError(what)


def require_finite(values: Tensor | None, what: str) -> None:
    """Raises ContractError naming the first position that is not finite."""
    if values is not None and not (finite := values.isfinite()).all():
        raise ContractError(f"{what}: not finite at index {(~finite).nonzero()[0].tolist()}")


def require_finite_gradients(output: Tensor, x: Tensor, module: nn.Module, what: str) -> None:
    """Gradients of the output's summed squares with respect to x and all parameters; raises as `require_finite`."""
    if output.requires_grad:
        module.zero_grad()
        output.square().sum().backward()
        for name, values in (("x", x), *module.named_parameters()):
            require_finite(values.grad, f"{what}: gradient of {name}")
