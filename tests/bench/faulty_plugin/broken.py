"""Softmax attention that goes wrong in one forward pass of training, the way its YAML says."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax


class Unprintable(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def wait(folder: Path) -> None:
    """Say that this point is reached, with the process id, and go no further until the file `go` is there."""
    (folder / "reached").write_text(str(os.getpid()))
    while not (folder / "go").exists():
        time.sleep(0.01)


def once(folder: Path, fault: str) -> bool:
    """True for the first caller of a sweep."""
    try:
        (folder / fault).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Broken(Softmax):
    """Goes wrong in forward number `at` of a training; FAULTY names a folder for the faults that need one.

    Args:
        fault: what goes wrong, see `forward`.
        at: training forward, counted from 1.
    """

    def __init__(self, spec: LayerSpec, *, fault: str, at: int = 2):
        super().__init__(spec)
        self.fault, self.at, self.count = fault, at, 0
        if fault == "constructor":
            raise ValueError("cannot be built\nsecond line")

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        output = super().forward(x, context, key_mask=key_mask)
        self.count += self.training
        if not self.training or self.count != self.at:
            return output
        folder = Path(os.environ.get("FAULTY", "."))
        if self.fault == "nan":
            return output * torch.nan
        if self.fault == "nan_gradient":  # the loss of this step is fine, every later one is not
            output.register_hook(lambda gradient: gradient * torch.nan)
        elif self.fault == "error":
            raise RuntimeError("first line\nsecond line")
        elif self.fault == "unprintable":
            raise Unprintable
        elif self.fault == "memory":
            raise MemoryError
        elif self.fault == "torch_memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        elif self.fault == "huge":
            torch.empty(2**55, dtype=torch.uint8)
        elif self.fault == "exit":
            if once(folder, "exit"):
                os._exit(0)
        elif self.fault == "system_exit":
            print("these were the last words", file=sys.stderr)
            raise SystemExit(0)
        elif self.fault == "segfault":
            ctypes.string_at(0)
        elif self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "hang":
            threading.Event().wait()
        elif self.fault == "hold":  # hang in C code with the interpreter lock held
            (folder / "reached").write_text(str(os.getpid()))
            ctypes.PyDLL(None).pause()
        elif self.fault == "linger":  # a thread that keeps the finished process alive
            threading.Thread(target=threading.Event().wait).start()
        elif self.fault == "gate" and "FAULTY" in os.environ:
            wait(folder)
        return output
