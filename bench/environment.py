"""Facts about code, software and hardware that stand in every record."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.config import ROOT

PACKAGES = ("torch", "triton", "hydra-core", "numpy", "pandas", "datasets")


@cache
def code() -> dict[str, Any]:
    """Commit of the checkout and whether it was changed; None where there is no git."""

    def git(*arguments: str) -> str | None:
        try:
            out = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return out.stdout if out.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!results") if commit else None
    diff = git("diff", "HEAD", "--", ".", ":!results") if changes else None
    return dict(
        git_commit=commit.strip() if commit else None,
        git_dirty=bool(changes) if changes is not None else None,
        git_diff_sha256=hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    )


@cache
def software() -> dict[str, Any]:
    """Versions of Python and of the packages results depend on; None for one that is not installed."""
    return dict(python=platform.python_version(), **{name.replace("-", "_"): _version(name) for name in PACKAGES})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def processor() -> dict[str, Any]:
    """The machine, without its name."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    return dict(cpu=model, cores=os.cpu_count(), system=f"{platform.system()} {platform.machine()}")


def load() -> float | None:
    """Processes that wanted a core during the last minute, per core: above 1, times are those of a busy machine."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:  # not every system counts them
        return None


def accelerator(device: Any) -> dict[str, Any]:
    """The device a replica ran on: name, and for a GPU its memory, CUDA and driver."""
    import torch

    facts: dict[str, Any] = dict(
        device=str(device), device_name=processor()["cpu"], num_threads=torch.get_num_threads()
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts.update(device_name=properties.name, device_memory_bytes=properties.total_memory, cuda=torch.version.cuda)
        facts["driver"] = _driver()
    return facts


def _driver() -> str | None:
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.splitlines()[0].strip() if out.returncode == 0 and out.stdout else None
