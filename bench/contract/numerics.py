"""Numbers: gradients arrive, low precision stays close, and a full budget is softmax attention."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from attentions.base import LayerSpec, auxiliary_losses
from bench.config import CONF
from bench.contract.comparing import (
    BFLOAT16,
    FLOAT32,
    FORMS,
    ContractError,
    NotApplicable,
    require_equal,
    require_finite,
)
from bench.contract.layers import LENGTH, Factory, build, constructor, inputs, run_layer

COUNT = 521  # a bfloat16 sum of ones stands still at 256


def check_gradients(factory: Factory, spec: LayerSpec) -> None:
    """Every parameter that asks for a gradient gets one, from the output or from a finite auxiliary loss."""
    module = build(factory, spec).train()
    output = module(*inputs(spec))
    auxiliary = auxiliary_losses(module)
    for name, loss in auxiliary.items():
        if loss.dim() or not loss.isfinite():
            raise ContractError(f"the auxiliary loss {name} is no finite scalar: {list(loss.shape)} {loss}")
    if any(parameter.requires_grad for parameter in module.parameters()):
        if not output.requires_grad:
            raise ContractError("the output carries no gradient")
        (output.square().sum() + sum(auxiliary.values())).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any()):
            raise ContractError(f"parameter {name} gets no gradient")


def check_precision(factory: Factory, spec: LayerSpec) -> str:
    """float32 stays close to float64 and bfloat16 to float32; inputs a hundred times larger stay finite.

    Where the mechanism `selects`, rounding turns some choices over, and half of the positions must stay close.
    """
    arguments = inputs(spec, COUNT)
    errors = {}
    for low, high, allowed in ((torch.float32, torch.float64, FLOAT32), (torch.bfloat16, torch.float32, BFLOAT16)):
        module = rounded = build(factory, spec).to(low)
        exact = copy.deepcopy(rounded).to(high)  # the same rounded weights: only the arithmetic differs
        output = run_layer(rounded, *(part.to(low) for part in arguments))
        expected = run_layer(exact, *(part.to(low).to(high) for part in arguments))
        if output.dtype != low:
            raise ContractError(f"x in {low} gives an output in {output.dtype}")
        require_finite(output, f"output in {low}")
        size = expected.double().square().mean().sqrt().clamp_min(1e-30)
        wrong = (output.double() - expected.double()).square().mean(-1)  # of each row and position
        typical, words = (wrong.median(), "median") if module.selects else (wrong.mean(), "root mean square")
        error = errors[low] = float(typical.sqrt() / size)
        if error > allowed:
            raise ContractError(f"{low} is off by {error:.1e} ({words}) from {high}; allowed: {allowed:.0e}")
    module = build(factory, spec, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        require_finite(run_layer(module, *(part.float() for part in arguments)), "output under bfloat16 autocast")
    loud = [100 * part.float() for part in arguments]
    output = module(loud[0].requires_grad_(), *loud[1:])
    require_finite(output, "output for inputs of size 100")
    if output.requires_grad:
        output.sum().backward()
        require_finite(loud[0].grad, "gradient for inputs of size 100")
    return f"float32 {errors[torch.float32]:.0e}, bfloat16 {errors[torch.bfloat16]:.0e}"


def check_full_budget(factory: Factory, spec: LayerSpec) -> None:
    """With nothing left out (`full_budget`) it is softmax attention: values and gradients."""
    cls = constructor(factory)
    if cls is None or cls.full_budget is None:
        raise NotApplicable("no budget at which it is softmax attention: full_budget is None")
    budget = cls.full_budget(LENGTH)
    softmax = instantiate(OmegaConf.load(CONF / "attention" / "softmax.yaml"))
    rotary = replace(spec, rotary_base=None if spec.cross else 10000.0)
    for variant in (spec, replace(spec, num_heads=6, num_kv_heads=2), rotary):
        module = build(factory, variant, **budget)
        weights = module.state_dict()
        reference = build(softmax, variant, bias="q_proj.bias" in weights)
        missing, _ = reference.load_state_dict(weights, strict=False)
        if missing:
            raise ContractError(f"it lacks the weights of softmax attention: {', '.join(missing)}")
        results = []
        for layer in (module, reference):
            x, *context = inputs(variant)
            output = layer(x.requires_grad_(), *context)
            output.square().sum().backward()
            results.append((output, x.grad))
        words = f"H={variant.num_heads}, G={variant.kv_heads}, rotary={variant.rotary_base}, {budget}"
        for what, got, expected in zip(("output", "gradient"), *results, strict=True):
            require_equal(got, expected, f"{words}: {what} against softmax attention", FORMS)
