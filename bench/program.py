"""One optimiser step as a function, eager or compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attentions.base import auxiliary_losses
from bench.backbones.base import Backbone
from bench.config import Budget
from tasks.base import IGNORE, Batch, Task

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


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float, Tensor | float]]:
    """A batch in parts of `size` examples, the share of each in its examples and in its labels; whole for None.

    A mean over the labels of the batch is that sum of the parts' means; no part may be without labels.
    """
    if size is None or len(batch) <= size:
        yield batch, 1.0, 1.0
        return
    labels = (batch.targets != IGNORE).flatten(1).sum(1)
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        part = batch.rows(rows)
        yield part, len(part) / len(batch), labels[rows].sum() / labels.sum()


def make_step(
    model: Backbone, task: Task, optimiser: torch.optim.Optimizer, budget: Budget, device: torch.device
) -> Step:
    """A function (batch, learning rate) -> the task's loss and those that mechanisms add, by name.

    All are scalars on the device that nobody has waited for. A batch goes through the model in parts of
    `micro_batch_size` examples whose gradients add up to the batch's.
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
        optimiser.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        for part, share, labelled in micro_batches(batch, budget.micro_batch_size):
            loss = forward(part) * labelled if share < 1 else forward(part)
            auxiliary = auxiliary_losses(model)
            if share < 1:
                auxiliary = {name: term * share for name, term in auxiliary.items()}
            total = loss + sum(auxiliary.values()) if auxiliary else loss
            total.backward()
            for name, term in {"loss": loss, **auxiliary}.items():
                losses[name] = losses[name] + term.detach() if name in losses else term.detach()
        if budget.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, budget.max_grad_norm, foreach=True)
        optimiser.step()
        return losses

    return step
