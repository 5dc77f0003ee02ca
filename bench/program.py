"""One optimiser step as a function, eager or compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from attentions.base import auxiliary_losses
from bench.backbones.base import Backbone
from bench.config import Budget
from tasks.base import Batch, Task

Step = Callable[[Batch, float], dict[str, Tensor]]


def autocast(budget: Budget, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 autocast where the budget asks for it; float32 master weights always."""
    if budget.precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def output_of(model: Backbone, batch: Batch) -> Tensor:
    """Logits [B, P, C] of a batch."""
    return model(
        batch.inputs,
        batch.positions,
        key_mask=batch.key_mask,
        context=batch.context,
        context_mask=batch.context_mask,
    )


def make_step(
    model: Backbone, task: Task, optimiser: torch.optim.Optimizer, budget: Budget, device: torch.device
) -> Step:
    """A function (batch, learning rate) -> the task's loss and those that mechanisms add, by name.

    All are scalars on the device that nobody has waited for.
    """

    def loss_of(batch: Batch) -> Tensor:
        with autocast(budget, device):
            output = output_of(model, batch)
        return task.loss(output, batch)

    forward = torch.compile(loss_of, dynamic=False) if budget.program == "compiled" else loss_of
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(batch: Batch, rate: float) -> dict[str, Tensor]:
        model.train()
        for group in optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        loss = forward(batch)
        auxiliary = auxiliary_losses(model)
        total = loss + sum(auxiliary.values()) if auxiliary else loss
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        if budget.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, budget.max_grad_norm, foreach=True)
        optimiser.step()
        return {"loss": loss.detach(), **{name: term.detach() for name, term in auxiliary.items()}}

    return step
