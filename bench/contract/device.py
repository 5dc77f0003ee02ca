"""The device: a layer lies where it was moved to, and a GPU computes what the CPU does."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import torch
from torch import Tensor

from attentions.base import Attention, LayerSpec, auxiliary_losses
from bench.contract.comparing import FORMS, ContractError, NotApplicable, require_equal, require_finite
from bench.contract.decoding import decode, leaves, started
from bench.contract.layers import BATCH, Factory, build, inputs

MASKED = 7  # positions at the end
ELSEWHERE = "on device cpu", "same device", "on cpu", "is on meta"  # in what torch says of two devices in one operation


def check_device(factory: Factory, spec: LayerSpec) -> str:
    """On a GPU: outputs, gradients and decoding as on the CPU. Without one: no tensor made on the CPU comes in."""
    if torch.cuda.is_available():
        on_gpu(factory, spec)
        return torch.cuda.get_device_name()
    try:
        with mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()):  # there is none for this device
            everything(factory, spec, "meta")
    except (ContractError, NotApplicable):
        raise
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if any(mark in words for mark in ELSEWHERE):
            raise ContractError(f"a tensor is made without device=: {words}") from error
        raise NotApplicable(f"no GPU here, and tensors without values do not do: {words}") from error
    return "no GPU here: on tensors without values"


def on_gpu(factory: Factory, spec: LayerSpec) -> None:
    """Raises ContractError where the GPU's numbers are others in float64, or not finite in bfloat16 autocast."""
    for what, got, expected in zip(
        ("output", "gradient of x", "output under a mask", "decoding"),
        everything(factory, spec, "cuda"),
        everything(factory, spec, "cpu"),
        strict=True,
    ):
        if (got is None) != (expected is None):
            raise ContractError(f"there is no {what} on the {'GPU' if got is None else 'CPU'}")
        if got is not None and expected is not None:
            require_equal(got.cpu(), expected, f"{what} on the GPU against the CPU", FORMS)
    module = build(factory, spec, dtype=torch.float32).to("cuda").train()
    x, *context = [part.to("cuda") for part in inputs(spec, dtype=torch.float32)]
    with torch.autocast("cuda", torch.bfloat16):
        output = module(x.requires_grad_(), *context)
    require_finite(output, "output under bfloat16 autocast on the GPU")
    loss = output.float().square().mean() + sum(auxiliary_losses(module).values())
    if loss.requires_grad:
        loss.backward()
        require_finite(x.grad, "gradient under bfloat16 autocast on the GPU")


def everything(factory: Factory, spec: LayerSpec, device: str) -> tuple[Tensor | None, ...]:
    """Output, gradient of x, output under a mask and decoded outputs; a layer in train mode runs there as well."""
    module = build(factory, spec).to(device)
    x, *context = [part.to(device) for part in inputs(spec)]
    output = module(x.requires_grad_(), *context)
    if output.device != x.device:
        raise ContractError(f"x on {x.device} gives an output on {output.device}")
    if output.requires_grad:
        output.square().sum().backward()
    gradient, x = x.grad, x.detach()
    length = (context[0] if context else x).shape[1]
    seen = torch.arange(length, device=device) < length - MASKED
    masked = module(x, *context, key_mask=seen.expand(BATCH, -1))[:, :-MASKED]  # a masked position's own is nobody's
    decoded = stepwise(module, x, *context) if spec.causal else None
    training = build(factory, spec).to(device).train()
    loss = training(x, *context).square().sum() + sum(auxiliary_losses(training).values())
    if loss.requires_grad:
        loss.backward()
    return output.detach(), gradient, masked.detach(), decoded


@torch.no_grad()
def stepwise(module: Attention, x: Tensor, *context: Tensor) -> Tensor | None:
    """Outputs of decoding, whose state must lie where x does; None where it differs from training by design."""
    try:
        state = started(module, BATCH, *context)
    except NotApplicable:
        return None
    outputs, state = decode(module, x, state)
    for name, value in leaves(state):
        if isinstance(value, Tensor) and value.device != x.device:
            raise ContractError(f"decoding on {x.device} leaves {name} on {value.device}")
    return outputs
