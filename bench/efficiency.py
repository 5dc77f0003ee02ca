"""What a trained model costs: decode latency and state, measured on the model itself."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from bench.backbones.base import Backbone


@dataclass(frozen=True)
class Decoding:
    """Measured by decoding one sequence token by token from the empty state.

    state_bytes: of one sequence after `length` tokens, all layers; ms_per_token: median over the steps.
    """

    state_bytes: int
    ms_per_token: float
    length: int


def decoding(model: Backbone, length: int, device: torch.device, context_length: int | None = None) -> Decoding:
    """Decode `length` tokens at batch 1 in float32 (over a context, if any) and measure the state left behind."""
    was_training = model.training
    model.eval()
    times = []
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        context = None
        if context_length is not None:
            context = torch.zeros(1, context_length, dtype=torch.int64, device=device)
        state = model.init_state(1, context)
        for _ in range(length):
            started = time.perf_counter()
            _, state = model.step(token, state)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    model.train(was_training)
    return Decoding(state_bytes=state.nbytes, ms_per_token=1e3 * statistics.median(times), length=length)


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
