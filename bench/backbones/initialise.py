"""Initial weights by name: equal seeds give equal backbones, whatever mechanism stands in them."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

from attentions.base import Attention

INITIALISATIONS = ("scaled_normal", "native")
RESIDUAL = ("out_proj", "fc2")  # projections back to the residual stream
STD = 0.02


def stream(seed: int, purpose: str) -> int:
    """Seed of one stream of random numbers, a stable hash of (seed, purpose)."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


def initialise(model: nn.Module, how: str, num_layers: int, seed: int) -> None:
    """Set the weights of Linear and Embedding modules, each from (seed, name).

    Args:
        how: `scaled_normal` (GPT-2's, as in Zoology): weights N(0, 0.02), biases zero, projections back to the residual
            stream N(0, 0.02 / sqrt(2 * layers)). It overwrites Linear layers inside a mechanism, as published; what a
            mechanism keeps outside of them is left alone.
            `native`: a mechanism keeps what its constructor made; Linear layers around it as torch makes them,
            embeddings N(0, 1 / sqrt(width)), so that tied logits start at unit scale. Small models learn recall
            several times faster from it.
        num_layers: depth of the stack.
    """
    mechanism = {id(inner) for outer in model.modules() if isinstance(outer, Attention) for inner in outer.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        torch.manual_seed(stream(seed, name))
        if how == "scaled_normal":
            scale = 1 / math.sqrt(2 * num_layers) if name.rpartition(".")[2] in RESIDUAL else 1.0
            nn.init.normal_(module.weight, std=STD * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif id(module) not in mechanism:
            module.reset_parameters()
    if how == "native":  # last: a tied projection is the embedding's weight too
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                torch.manual_seed(stream(seed, name))
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
