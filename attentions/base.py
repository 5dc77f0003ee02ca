"""What every mechanism is: a layer from [B, T, M] to [B, T, M], with a parallel form and a decode state.

`QKVAttention` is a memory with two verbs: write keys and values (`update`), read with queries (`read`);
`attend` is the same thing for all positions at once. Layout outside kernels: q [B, T, H, D], k and v
[B, S, G, D], with H query heads and G key-value heads.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Pattern(enum.Flag):
    """Where a mechanism can stand: {noncausal, causal} x {self, cross} (CAB's taxonomy).

    Causality is about queries: output t may read query positions <= t and, in self-attention, key
    positions <= t. In cross-attention the whole context is visible; 'causal cross' forbids future
    *queries* only.
    """

    NONCAUSAL_SELF = enum.auto()
    CAUSAL_SELF = enum.auto()
    NONCAUSAL_CROSS = enum.auto()
    CAUSAL_CROSS = enum.auto()
    SELF = NONCAUSAL_SELF | CAUSAL_SELF
    CROSS = NONCAUSAL_CROSS | CAUSAL_CROSS
    ALL = SELF | CROSS

    @classmethod
    def of(cls, *, causal: bool, cross: bool) -> Pattern:
        """The single pattern of a slot."""
        if cross:
            return cls.CAUSAL_CROSS if causal else cls.NONCAUSAL_CROSS
        return cls.CAUSAL_SELF if causal else cls.NONCAUSAL_SELF

    def names(self) -> list[str]:
        """The single patterns contained, as lower-case words: ['causal self', ...]."""
        return [str(pattern.name).lower().replace("_", " ") for pattern in self]


class Unsupported(ValueError):
    """The mechanism cannot fill this slot; a result with a reason, not a mistake."""


class UnsupportedPattern(Unsupported):
    """The mechanism is not defined for the pattern of the slot."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """All that a backbone tells a layer about the slot it fills.

    Args:
        dim: width M of the residual stream.
        num_heads: query heads H.
        causal: output t may depend on query positions <= t only.
        cross: keys and values come from a separate context.
        num_kv_heads: key-value heads G, a divisor of H; None means H.
        max_length: longest sequence the slot will see, in positions.
        context_length: longest context in cross-attention; None means max_length.
        grid: rows, columns, ... of an image whose pixels are the positions, last axis fastest; None: a line. Every
            sequence of such a slot has as many positions as the grid; in cross-attention it is the queries' grid.
        rotary_base: rotate q and k by position with this base (RoPE); None leaves them alone.
        layer, num_layers: index of this layer among those that the mechanism fills, and their number.
    """

    dim: int
    num_heads: int
    causal: bool
    cross: bool = False
    num_kv_heads: int | None = None
    max_length: int = 2048
    context_length: int | None = None
    grid: tuple[int, ...] | None = None
    rotary_base: float | None = None
    layer: int = 0
    num_layers: int = 1

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "num_kv_heads", "num_layers", "max_length", "context_length"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.grid is not None and (len(self.grid) < 1 or min(self.grid) < 1):
            raise ValueError(f"grid must hold sizes of at least 1, got {self.grid}")
        if self.dim % self.num_heads:
            near = sorted(
                (h for h in range(1, self.dim + 1) if self.dim % h == 0), key=lambda h: abs(h - self.num_heads)
            )
            raise ValueError(
                f"num_heads must divide dim, got dim={self.dim} and num_heads={self.num_heads}; "
                f"nearest: {', '.join(map(str, sorted(near[:2])))}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got num_heads={self.num_heads} "
                f"and num_kv_heads={self.num_kv_heads}"
            )

    @property
    def kv_heads(self) -> int:
        """Key-value heads G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def max_keys(self) -> int:
        """The longest sequence of keys: of the context in cross-attention, else of the sequence itself."""
        return self.max_length if self.context_length is None or not self.cross else self.context_length

    @property
    def head_dim(self) -> int:
        """Width D of one head."""
        return self.dim // self.num_heads

    @property
    def pattern(self) -> Pattern:
        return Pattern.of(causal=self.causal, cross=self.cross)


@dataclass(kw_only=True)
class State:
    """What decoding carries from one position to the next; passed and returned, never kept on the module.

    `position` counts the positions written so far and is bookkeeping, not state bytes.
    """

    position: int = 0

    @property
    def nbytes(self) -> int:
        """Measured size of all tensors held, nested states included, over the whole batch."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, State):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class Attention(nn.Module, ABC):
    """Mixes information across positions: [B, T, M] -> [B, T, M].

    A constructor takes the spec and its own hyper-parameters as keywords, never **kwargs.

    Class attributes:
        patterns: the slots that it can fill; impossible: for each of the others, why the mathematics forbids it.
        paper: link to the source; "control" for what moves nothing between positions.
        complexity: of all positions at once, per head and channel: T queries, S keys, and its own hyper-parameters.
        selects: it chooses keys by sorting, top-k or hashing, so rounding may turn a choice over.
        requires: what it needs beyond a CPU with torch, such as "CUDA"; None: nothing.
        leaks: how an output of its causal forms comes to depend on the future, as published; None: it does not. Such a
            row runs, is listed and is not ranked among causal ones; its strict twin is.
        stepwise: why decoding differs from training by design; None: it does not.
        full_budget: hyper-parameters for length T at which it is softmax attention; None: there are none.

    Raises:
        UnsupportedPattern: at construction, when `spec.pattern` is not among `patterns`; with the reason.
    """

    patterns: ClassVar[Pattern]
    impossible: ClassVar[dict[Pattern, str]] = {}
    paper: ClassVar[str]
    complexity: ClassVar[str] = "not declared"
    selects: ClassVar[bool] = False
    requires: ClassVar[str | None] = None
    leaks: ClassVar[str | None] = None
    stepwise: ClassVar[str | None] = None
    full_budget: ClassVar[Callable[..., dict[str, Any]] | None] = None

    def __init__(self, spec: LayerSpec):
        super().__init__()
        if spec.pattern not in self.patterns:
            reasons = [why for pattern, why in self.impossible.items() if spec.pattern in pattern]
            raise UnsupportedPattern(
                f"{type(self).__name__} is not defined for {spec.pattern.names()[0]} attention"
                f"{''.join(f' ({why})' for why in reasons)}; it has: {', '.join(self.patterns.names())}"
            )
        self.spec = spec
        self._auxiliary: dict[str, Tensor] = {}

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """All positions at once.

        Args:
            x: [B, T, M], the queries' stream.
            context: [B, S, M] in cross-attention, None in self-attention.
            key_mask: [B, S] bool, True where a key may be read; outputs do not depend on masked keys.

        Returns:
            [B, T, M], dtype of x.
        """

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        """The state before the first position; in cross-attention the context is written here, once."""
        raise UnsupportedPattern(f"{type(self).__name__} has no decode state")

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One position: x [B, 1, M] -> ([B, 1, M], next state). Never changes `state` in place."""
        raise UnsupportedPattern(f"{type(self).__name__} has no decode state")

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's state after `length` positions (in cross-attention: of the context), by formula.

        For a float32 layer and no mask. `State.nbytes` is the measured size; a contract test holds the two equal.
        """
        raise UnsupportedPattern(f"{type(self).__name__} declares no formula for its state: write state_bytes")

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """All positions of a prompt [B, T, M] and the state after them; the step loop unless overridden.

        `key_mask` is that of the context; a prompt itself is not masked.
        """
        state = self.init_state(x.shape[0], context, key_mask=key_mask)
        outputs = []
        for t in range(x.shape[1]):
            output, state = self.step(x[:, t : t + 1], state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    def _source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Where keys and values come from."""
        if self.spec.cross != (context is not None):
            raise ValueError(
                f"spec.cross={self.spec.cross}, but a context was {'not ' if context is None else ''}given"
            )
        return x if context is None else context

    def add_auxiliary(self, **losses: Tensor) -> None:
        """Called by a forward in train mode: scalar losses by name, each with its weight already in it."""
        self._auxiliary = losses if self.training else {}

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Scalar losses that the last forward left for the trainer to add, such as a router's balance; given once."""
        losses, self._auxiliary = self._auxiliary, {}
        return losses


Factory = Callable[[LayerSpec], Attention]


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """Losses of all mechanisms inside a model, summed by name over layers."""
    total: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            for name, loss in module.auxiliary_losses().items():
                total[name] = total[name] + loss if name in total else loss
    return total


class QKVAttention(Attention):
    """An attention whose memory is written with keys and values and read with queries.

    A subclass gives the parallel form (`attend`) and the memory (`init_memory`, `update`, `read`); the
    contract tests hold the two equal. Terms that travel with keys and values (decay, write strength)
    come from `terms`; what follows the heads (output norm, gate) from `merge`.

    Args:
        spec: the slot.
        key_dim, value_dim: width of one head of q, k and of v; None means `spec.head_dim`.
        bias: bias on the four projections.
    """

    def __init__(
        self, spec: LayerSpec, *, key_dim: int | None = None, value_dim: int | None = None, bias: bool = False
    ):
        super().__init__(spec)
        self.key_dim = key_dim or spec.head_dim
        self.value_dim = value_dim or spec.head_dim
        if spec.rotary_base is not None and self.key_dim % 2:
            raise ValueError(
                f"rotary positions need an even key width per head, got {self.key_dim}; "
                f"nearest: {max(2, self.key_dim - 1)}, {self.key_dim + 1}"
            )
        self.q_proj = nn.Linear(spec.dim, spec.num_heads * self.key_dim, bias=bias)
        self.k_proj = nn.Linear(spec.dim, spec.kv_heads * self.key_dim, bias=bias)
        self.v_proj = nn.Linear(spec.dim, spec.kv_heads * self.value_dim, bias=bias)
        self.out_proj = nn.Linear(spec.num_heads * self.value_dim, spec.dim, bias=bias)

    # -- what a mechanism writes ------------------------------------------------------------------

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        """Parallel form: q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] -> [B, T, H, V]."""

    def init_memory(self, batch_size: int, like: Tensor) -> State:
        """The empty memory, with dtype and device of `like`."""
        raise UnsupportedPattern(f"{type(self).__name__} has no decode state")

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> State:
        """Write S >= 1 further positions: k [B, S, G, K], v [B, S, G, V]. Returns a new state."""
        raise UnsupportedPattern(f"{type(self).__name__} has no decode state")

    def read(self, q: Tensor, state: State) -> Tensor:
        """Read with queries that see all that was written: [B, T, H, K] -> [B, T, H, V]."""
        raise UnsupportedPattern(f"{type(self).__name__} has no decode state")

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        """Per-position terms that go with the keys and values of `source` [B, S, M]; none by default."""
        return {}

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        """From heads [B, T, H, V] back to the stream [B, T, M]; x [B, T, M] is there for output gates."""
        return self.out_proj(heads.flatten(2))

    # -- written once -----------------------------------------------------------------------------

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        """Projected queries [B, T, H, K], rotated from position `start` where the spec asks for it."""
        q = self.q_proj(x).unflatten(-1, (self.spec.num_heads, self.key_dim))
        return self._rotate(q, start)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Projected keys [B, S, G, K] and values [B, S, G, V]."""
        k = self.k_proj(source).unflatten(-1, (self.spec.kv_heads, self.key_dim))
        v = self.v_proj(source).unflatten(-1, (self.spec.kv_heads, self.value_dim))
        return self._rotate(k, start), v

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        if self.spec.rotary_base is None or self.spec.cross:  # two sequences share no origin
            return heads
        return rotary(heads, base=self.spec.rotary_base, start=start)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source = self._source(x, context)
        k, v = self.key_value(source)
        return self.merge(x, self.attend(self.query(x), k, v, key_mask=key_mask, **self.terms(source)))

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        memory = self.init_memory(batch_size, self.out_proj.weight)
        if not self.spec.cross:
            return memory
        if context is None:
            raise ValueError("cross-attention decodes over a context: init_state(batch_size, context)")
        return self.update(memory, *self.key_value(context), key_mask=key_mask, **self.terms(context))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q = self.query(x, state.position)
        if not self.spec.cross:
            state = self.update(state, *self.key_value(x, state.position), **self.terms(x))
        return self.merge(x, self.read(q, state)), state

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0], context, key_mask=key_mask)
        if not self.spec.cross:
            state = self.update(state, *self.key_value(x), **self.terms(x))
        return self.forward(x, context, key_mask=key_mask), state


def rotary(heads: Tensor, *, base: float = 10000.0, start: int = 0) -> Tensor:
    """Rotate [B, T, H, K] by position: pairs (j, j + K/2) turn by (start + t) * base^(-2j/K).

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34, in the half-split pairing of GPT-NeoX
    and Llama (a fixed permutation of the paper's neighbouring pairs; inner products are equal).
    """
    half = heads.shape[-1] // 2
    # float32 angles: bf16 cannot tell neighbouring positions apart past 256
    frequency = base ** (-torch.arange(half, device=heads.device, dtype=torch.float32) / half)
    position = torch.arange(start, start + heads.shape[1], device=heads.device, dtype=torch.float32)
    angle = (position[:, None] * frequency)[:, None, :]
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def repeat_heads(heads: Tensor, num_heads: int) -> Tensor:
    """Grouped heads: [B, S, G, D] -> [B, S, H, D], head h reading group h // (H / G)."""
    groups = heads.shape[2]
    return heads if groups == num_heads else heads.repeat_interleave(num_heads // groups, dim=2)
