"""`python -m bench.race`: training steps per second against a step as Zoology publishes it, interleaved in one run.

The published step is re-created from its description: float32; softmax attention that materialises its scores and
rebuilds the mask; logits and arg-max at every position; cross-entropy that ignores unlabelled ones; AdamW on
everything; the loss read twice per step. Both contenders train the same network (one short convolution, one attention
layer, tied embeddings) on the same batches. Each runs in a process of its own, so that `kept memory` (the allocator
settings that the runner gives its children) can differ, and only one of them works at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from bench import errors
from bench.isolation import environment

ROUNDS, STEPS, WARM_UP = 7, 4, 3
CONTENDERS = {  # name -> (step, precision, allocator keeps memory)
    "published step": ("published", "float32", False),
    "published step, kept memory": ("published", "float32", True),
    "ours, float32": ("ours", "float32", True),
    "ours, bfloat16": ("ours", "bfloat16", True),
}


def main() -> int:
    """Print one row per contender: median milliseconds per step, and the ratio to each published row."""
    parser = argparse.ArgumentParser(prog="python -m bench.race", description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(json.loads(arguments.worker))
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < 1:
            raise errors.UserError(f"--{name} must be at least 1, got {value}")
    shape = {key: value for key, value in vars(arguments).items() if key != "worker"}
    workers = {name: start(shape, *how) for name, how in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    try:
        for worker in workers.values():
            ask(worker, WARM_UP)
        for round_number in range(ROUNDS):
            names = list(CONTENDERS)
            for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
                seconds[name].append(ask(workers[name], STEPS) / STEPS)
    finally:
        for worker in workers.values():
            worker.kill()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"one CPU thread, {ROUNDS} interleaved rounds of {STEPS} steps, median ms per step; {json.dumps(shape)}")
    print(f"{'':30} {'ms/step':>8} {'min':>8} {'max':>8} {'vs published':>13} {'vs kept memory':>15}")
    for name, values in seconds.items():
        ratios = [medians[list(CONTENDERS)[i]] / medians[name] for i in (0, 1)]
        low, high = min(values), max(values)
        row = f"{name:30} {1e3 * medians[name]:8.1f} {1e3 * low:8.1f} {1e3 * high:8.1f}"
        print(f"{row} {ratios[0]:12.1f}x {ratios[1]:14.1f}x")
    return 0


def start(shape: dict[str, int], step: str, precision: str, kept_memory: bool) -> subprocess.Popen:
    """A worker that waits for numbers of steps on its standard input."""
    env = environment({})
    if not kept_memory:
        env = {key: value for key, value in env.items() if not key.startswith("MALLOC_")}
    spec = json.dumps(dict(shape, step=step, precision=precision))
    command = [sys.executable, "-m", "bench.race", "--worker", spec]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def ask(worker: subprocess.Popen, steps: int) -> float:
    """Seconds that the worker took for `steps` steps."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise errors.UserError(f"a worker of the race ended with status {worker.wait()}")
    return float(answer)


def work(spec: dict[str, Any]) -> int:
    """A worker: build the contender, then time the steps it is asked for."""
    import itertools

    import torch

    from bench.training import epochs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task, segments = _task(spec)
    step = (_published if spec["step"] == "published" else _ours)(spec, task)
    batches = epochs(task, segments, spec["batch"], seed=0)
    for line in sys.stdin:
        chosen = [(batch, batch.labels()) for batch in itertools.islice(batches, int(line))]
        started = time.perf_counter()
        for batch, labels in chosen:
            step(batch, labels)
        print(time.perf_counter() - started, flush=True)
    return 0


def _task(spec: dict[str, Any]):
    from hydra.utils import instantiate

    segment = dict(length=spec["length"], num_pairs=spec["pairs"], num_examples=4 * spec["batch"])
    splits = dict(train=[segment], valid=[segment], test=[segment])
    task = instantiate(dict(_target_="tasks.mqar.MQAR", protocol="clean", vocab_size=spec["vocab"], **splits))
    return task, task.segments("train", 0)


def _ours(spec: dict[str, Any], task: Any):
    """The runner's own step on the same network."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from bench.backbones.base import build
    from bench.config import CONF, Budget
    from bench.program import make_step
    from bench.training import optimiser

    def part(name: str, **changes: Any) -> Any:
        return instantiate({**OmegaConf.load(CONF / f"{name}.yaml"), **changes}, _convert_="all")

    backbone = part("backbone/conv_decoder", dim=spec["dim"], state_mixer="zoology_identity", embedding_dropout=0.1)
    model = build(backbone, task.spec, part("attention/softmax", dropout=0.1, bias=True), seed=0)
    budget = Budget(max_steps=1, batch_size=spec["batch"], learning_rates=[1e-3], precision=spec["precision"])
    budget.max_grad_norm = None  # the published step does not clip
    run = make_step(model, task, optimiser(model, 1e-3, budget, torch.device("cpu")), budget, torch.device("cpu"))
    return lambda batch, labels: run(batch, 1e-3)


def _published(spec: dict[str, Any], task: Any):
    """The published step: every position is projected, normalised and arg-maxed; two reads of the loss."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from attentions.base import LayerSpec
    from attentions.ssm.short_conv import ShortConv

    dim, vocab = spec["dim"], spec["vocab"]
    layer = LayerSpec(dim=dim, num_heads=1, causal=True)

    class MaterialisedAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            scores = q @ (k / math.sqrt(dim)).transpose(1, 2)
            length = x.shape[1]
            mask = torch.triu(torch.full((length, length), -10000.0), 1)
            weights = torch.softmax(scores + mask, dim=-1)
            return self.out(F.dropout(weights, 0.1, self.training) @ v)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocab, dim)
            nn.init.normal_(self.embed.weight, std=0.02)
            self.mixers = nn.ModuleList([ShortConv(layer, kernel_size=3), MaterialisedAttention()])
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
            self.last = nn.LayerNorm(dim)

        def forward(self, tokens):
            x = F.dropout(self.embed(tokens), 0.1, self.training)
            for index, mixer in enumerate(self.mixers):
                x = x + mixer(self.norms[2 * index](x))
                x = x + self.norms[2 * index + 1](x)
            return self.last(x) @ self.embed.weight.T

    model = Network().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    reports: list[float] = []

    def step(batch: Any, labels: Any) -> None:
        optimiser.zero_grad()
        logits = model(batch.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        logits.argmax(dim=-1)
        loss.backward()
        optimiser.step()
        reports[:] = [loss.item(), loss.item()]

    return step


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    errors.run(main)
