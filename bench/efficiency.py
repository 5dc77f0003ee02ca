"""What a trained model costs: decode latency and state, measured on the model itself."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from bench.backbones.base import Backbone
from tasks.base import TaskSpec, Tokens, Vectors


@dataclass(frozen=True)
class Decoding:
    """Measured by decoding one sequence token by token from the empty state.

    state_bytes: of one sequence after `length` tokens, all layers; ms_per_token: median over the steps.
    """

    state_bytes: int
    ms_per_token: float
    length: int


def decoding(model: Backbone, spec: TaskSpec, device: torch.device) -> Decoding:
    """Decode `spec.length` positions at batch 1 in float32 (over a context, if any) and measure the state left."""
    was_training = model.training
    model.eval()
    times = []
    token = _nothing(spec.inputs, 1, device)
    with torch.no_grad():
        context = _nothing(spec.context, spec.context_length, device) if spec.context and spec.context_length else None
        state = model.init_state(1, context)
        for _ in range(spec.length):
            started = time.perf_counter()
            _, state = model.step(token, state)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    model.train(was_training)
    return Decoding(state_bytes=state.nbytes, ms_per_token=1e3 * statistics.median(times), length=spec.length)


def _nothing(kind: Tokens | Vectors, length: int, device: torch.device) -> torch.Tensor:
    """A sequence of zeros: [1, length] token ids or [1, length, F] numbers."""
    if isinstance(kind, Vectors):
        return torch.zeros(1, length, kind.dim, device=device)
    return torch.zeros(1, length, dtype=torch.int64, device=device)


def reset_peak_memory(device: torch.device) -> None:
    """Start counting; a process's peak on a CPU cannot be reset and covers its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak since the reset: allocated by torch on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
