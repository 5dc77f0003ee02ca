"""Parts of every stack: pre-norm layers with self- and cross-attention, and the specs of their slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, Factory, LayerSpec, Pattern, State
from bench.backbones.base import DecodeState
from bench.errors import UserError, unknown
from tasks.base import TaskSpec

STATE_MIXERS = ("mlp", "sglu", "none", "zoology_identity")
NORMS = ("layer_norm", "simple_rms_norm")


def check_settings(
    *, dim: int, words: dict[str, tuple[str, tuple[str, ...]]], rates: dict[str, float], depths: dict[str, int]
) -> None:
    """Refuse what no stack can be built from: unknown words, dropout outside [0, 1), widths and depths below 1.

    Args:
        words: name -> value and the valid ones; rates: name -> dropout; depths: name -> number of layers.

    Raises:
        UserError: the first mistake, with the nearest valid value.
    """
    for name, (value, valid) in words.items():
        if value not in valid:
            raise unknown(f"backbone.{name}", value, valid)
    for name, number in {"dim": dim, **depths}.items():
        if number < 1:
            raise UserError(f"backbone.{name} must be at least 1, got {number}")
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"backbone.{name} must lie in [0, 1), got {rate}; nearest: 0.0")


def slot_spec(
    task: TaskSpec,
    pattern: Pattern,
    *,
    dim: int,
    num_heads: int,
    num_kv_heads: int | None,
    positions: str,
    layer: int = 0,
    num_layers: int = 1,
    on_context: bool = False,
) -> LayerSpec:
    """The spec of a slot with this pattern; `on_context`: self-attention over the context's own positions.

    Raises:
        UserError: a shape that cannot be, in one line.
    """
    context_length = task.context_length or task.length
    try:
        return LayerSpec(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            causal=pattern in Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS,
            cross=pattern in Pattern.CROSS,
            max_length=context_length if on_context else task.length,
            context_length=context_length if pattern in Pattern.CROSS else None,
            grid=None if on_context else task.grid,
            rotary_base=10000.0 if positions == "rotary" else None,
            layer=layer,
            num_layers=num_layers,
        )
    except ValueError as error:
        raise UserError(f"backbone: {error}") from error


class Layer(nn.Module):
    """x <- x + attention(LN(x)), then where there is one x <- x + cross(LN(x), context), x <- x + state_mixer(LN(x)).

    Args:
        attention: over x itself, or over a context when its spec says so (`cross`); None: no such branch.
        state_mixer: mlp, sglu, none or zoology_identity.
        mlp_ratio: width of the MLP or SGLU over dim; 0: neither.
        dropout: on every branch before it joins the stream.
        cross: a second attention, over a context.
        norm: layer_norm or simple_rms_norm, of the stream before each branch.
    """

    def __init__(
        self,
        dim: int,
        attention: Attention,
        state_mixer: str,
        mlp_ratio: float,
        dropout: float,
        cross: Attention | None = None,
        norm: str = "layer_norm",
    ):
        super().__init__()
        self.attention = attention
        self.attention_norm = make_norm(norm, dim)
        self.cross = cross
        self.cross_norm = None if cross is None else make_norm(norm, dim)
        self.dropout = nn.Dropout(dropout)
        self.state_mixer: nn.Module | None = None
        if state_mixer == "zoology_identity":
            self.state_mixer = nn.Identity()
        elif state_mixer != "none" and mlp_ratio > 0:
            self.state_mixer = (MLP if state_mixer == "mlp" else SGLU)(dim, mlp_ratio)
        if self.state_mixer is not None:
            self.state_norm = make_norm(norm, dim)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        normed = self.attention_norm(x)
        if self.attention.spec.cross:
            update = self.attention(normed, context, key_mask=context_mask)
        else:
            update = self.attention(normed, key_mask=key_mask)
        x = x + self.dropout(update)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), context, key_mask=context_mask))
        return self._mix_state(x)

    def init_state(self, batch_size: int, context: Tensor | None = None, context_mask: Tensor | None = None) -> State:
        reads = self.attention.spec.cross
        own = self.attention.init_state(
            batch_size, *([context] if reads else []), key_mask=context_mask if reads else None
        )
        if self.cross is None:
            return own
        return DecodeState(layers=(own, self.cross.init_state(batch_size, context, key_mask=context_mask)))

    def step(self, x: Tensor, memory: State) -> tuple[Tensor, State]:
        if self.cross is None or self.cross_norm is None:
            update, memory = self.attention.step(self.attention_norm(x), memory)
            return self._mix_state(x + self.dropout(update)), memory
        assert isinstance(memory, DecodeState)
        own, read = memory.layers
        update, own = self.attention.step(self.attention_norm(x), own)
        x = x + self.dropout(update)
        update, read = self.cross.step(self.cross_norm(x), read)
        return self._mix_state(x + self.dropout(update)), DecodeState(layers=(own, read), position=own.position)

    def _mix_state(self, x: Tensor) -> Tensor:
        return x if self.state_mixer is None else x + self.dropout(self.state_mixer(self.state_norm(x)))


class MLP(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, round(ratio * dim))
        self.fc2 = nn.Linear(round(ratio * dim), dim)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class SGLU(nn.Module):
    """A gated linear unit without activation: [(x W_v) * (x W_u)] W_o.

    Source: Qin et al. 2023 (TransNormerLLM), https://arxiv.org/abs/2307.14995, section 3.1 (simple GLU).
    """

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.value = nn.Linear(dim, round(ratio * dim), bias=False)
        self.gate = nn.Linear(dim, round(ratio * dim), bias=False)
        self.fc2 = nn.Linear(round(ratio * dim), dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.value(x) * self.gate(x))


class SimpleRMSNorm(nn.Module):
    """x / (||x||_2 / sqrt(M)), without a weight.

    Source: Qin et al. 2023 (TransNormerLLM), https://arxiv.org/abs/2307.14995, section 3.1.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def make_norm(kind: str, dim: int) -> nn.Module:
    """A norm over the width: layer_norm, or simple_rms_norm."""
    return SimpleRMSNorm() if kind == "simple_rms_norm" else nn.LayerNorm(dim)


def within(block: Callable[..., Attention] | None, mixer: Factory) -> Factory:
    """A factory of blocks with `mixer` inside, `block(spec, mixer=mixer)`; of the mixer itself without a block."""
    return mixer if block is None else functools.partial(block, mixer=mixer)


def alternating(
    attention: Factory, alternate_with: Factory | None, num_layers: int
) -> Iterator[tuple[Factory, int, int]]:
    """Factory, index among its own layers and their number, for every layer: `alternate_with` takes 0, 2, 4, ...

    Raises:
        UserError: fewer layers than mechanisms.
    """
    factories = [attention] if alternate_with is None else [alternate_with, attention]
    if num_layers < len(factories):
        raise UserError(f"backbone.num_layers must be at least {len(factories)}, got {num_layers}")
    for index in range(num_layers):
        kind = index % len(factories)
        yield factories[kind], index // len(factories), len(range(kind, num_layers, len(factories)))
