"""The training program: the same steps, batches and schedule for every mechanism. The loop is the protocol."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.backbones.base import Backbone, stream
from bench.config import Budget
from bench.evaluation import evaluate
from bench.program import make_step
from tasks.base import Batch, Task

VERSION = 1  # of the training program; bumped when the same configuration would give other numbers


@dataclass
class Training:
    """What training one replica gave.

    status: ok, nan or diverged, with the step and reason; stopped: why it ended (solved, steps).
    auxiliary: what mechanisms added to the loss, by name: the mean over the first and the last evaluation interval.
    """

    status: str = "ok"
    reason: str = ""
    stopped: str = "steps"
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    auxiliary: dict[str, dict[str, float]] = field(default_factory=dict)


def learning_rate(step: int, peak: float, budget: Budget) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to zero at `max_steps`; step counts from 0."""
    if step < budget.warmup_steps:
        return peak * (step + 1) / budget.warmup_steps
    progress = (step - budget.warmup_steps) / max(1, budget.max_steps - budget.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def epochs(task: Task, segments: Sequence[Batch], batch_size: int, seed: int) -> Iterator[Batch]:
    """Training batches for ever; the order depends on (task, seed) alone."""
    generator = torch.Generator().manual_seed(stream(seed, f"{task.id} order"))
    for _ in itertools.count():
        yield from task.batches(segments, batch_size, generator)


def within_epochs(budget: Budget, task: Task, segments: Sequence[Batch]) -> Budget:
    """The budget with the steps that its `max_epochs` of these segments allow."""
    if budget.max_epochs is None:
        return budget
    one = sum(1 for _ in task.batches(segments, budget.batch_size, torch.Generator()))
    return dataclasses.replace(budget, max_steps=min(budget.max_steps, one * budget.max_epochs))


def optimiser(model: Backbone, peak: float, budget: Budget, device: torch.device) -> torch.optim.Optimizer:
    """AdamW on all parameters, weight decay included, as Zoology does.

    On a CPU never `fused`: torch 2.13 misplaces the elements of a gradient with strides other than its parameter's.
    """
    return torch.optim.AdamW(
        model.parameters(),
        lr=torch.tensor(peak, device=device) if device.type == "cuda" else peak,
        betas=(budget.beta1, budget.beta2),
        weight_decay=budget.weight_decay,
        fused=True if device.type == "cuda" else None,
    )


def train(
    model: Backbone,
    task: Task,
    splits: dict[str, Sequence[Batch]],
    budget: Budget,
    peak: float,
    seed: int,
    device: torch.device,
    progress: Callable[[int, float | None], None] = lambda step, metric: None,
) -> Training:
    """Train one replica; early stop and status look at `valid` and the loss only, never at `test`.

    Args:
        splits: segments of train and valid, on the device.
        peak: learning rate after warm-up.
        progress: called at every evaluation with (steps done, primary metric on valid).
    """
    result = Training()
    step_fn = make_step(model, task, optimiser(model, peak, budget, device), budget, device)
    batches = epochs(task, splits["train"], budget.batch_size, seed)
    primary = task.spec.primary
    solvable = task.spec.metrics[primary].higher_is_better  # a share of right answers: `stop_at` says when it is enough
    losses: list[dict[str, Tensor]] = []  # on the device: reading one per step would stall a GPU
    first_loss = math.nan
    while result.steps < budget.max_steps:
        started = time.perf_counter()
        interval = min(budget.eval_every, budget.max_steps - result.steps)
        losses.clear()
        for batch in itertools.islice(batches, interval):
            losses.append(step_fn(batch, learning_rate(result.steps, peak, budget)))
            result.steps += 1
            result.examples += len(batch)
            result.tokens += batch.inputs.shape[0] * batch.inputs.shape[1]
        values = torch.stack([step["loss"] for step in losses]).tolist()  # waits for the device: the time is complete
        result.seconds += time.perf_counter() - started
        first_loss = values[0] if math.isnan(first_loss) else first_loss
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            step = result.steps - len(values) + bad + 1
            result.status, result.reason = "nan", f"loss is {values[bad]} at step {step}"
            result.stopped = "nan"
            return result
        mean_loss = sum(values) / len(values)
        added = {name: _mean(losses, name) for name in losses[-1] if name != "loss"}
        for name, mean in added.items():
            result.auxiliary.setdefault(name, {"first": mean})["last"] = mean
        scores = evaluate(model, task, splits["valid"], budget)
        row = dict(  # the columns of history.csv, see bench.store
            step=result.steps,
            train_loss=mean_loss,
            auxiliary_loss=sum(added.values()),
            valid_loss=scores.value("loss"),
            valid_metric=scores.value(primary),
            learning_rate=learning_rate(result.steps - 1, peak, budget),
            seconds=result.seconds,
        )
        result.history.append(row)
        progress(result.steps, row["valid_metric"])
        if not math.isfinite(row["valid_loss"]):  # the last update broke the weights, and no further loss shows it
            result.status = result.stopped = "nan"
            result.reason = f"validation loss is {row['valid_loss']} after step {result.steps}"
            return result
        if mean_loss > budget.diverged_at * first_loss:
            result.status = result.stopped = "diverged"
            result.reason = f"mean loss {mean_loss:.3g} by step {result.steps}, {first_loss:.3g} at the first"
            return result
        if solvable and budget.stop_at is not None and row["valid_metric"] >= budget.stop_at:
            result.stopped = "solved"
            return result
    return result


def _mean(losses: Sequence[dict[str, Tensor]], name: str) -> float:
    return float(torch.stack([step[name] for step in losses if name in step]).mean())
