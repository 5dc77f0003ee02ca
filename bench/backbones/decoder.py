"""A pre-norm decoder: causal self-attention in every layer, logits at labelled positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State
from bench.backbones.base import Backbone, DecodeState, Factory
from bench.backbones.embed import POSITIONS, TokenEmbedding
from bench.backbones.heads import TokenHead
from bench.backbones.initialise import INITIALISATIONS
from bench.errors import UserError, unknown
from tasks.base import TaskSpec

STATE_MIXERS = ("mlp", "none", "zoology_identity")


class Decoder(Backbone):
    """x <- x + attention(LN(x)); x <- x + state_mixer(LN(x)); after the last layer LN and the head.

    Args:
        task: inputs, classes and the longest input.
        attention: makes the layer of a slot.
        dim, num_layers, num_heads, num_kv_heads: M, depth, H, G.
        positions: none, learned (absolute) or rotary.
        state_mixer: mlp (GELU, width mlp_ratio * dim); none; zoology_identity, which adds LN(x) itself to the
            stream: what `state_mixer=Identity` does in Zoology, and needed to reproduce its cells.
        mlp_ratio: width of the MLP in units of dim; 0 means no MLP.
        tied_embeddings: the head shares the token embedding.
        embedding_dropout, residual_dropout: after the embedding; on every branch before it joins the stream.
        initialisation: scaled_normal or native, see `bench.backbones.initialise`.
        alternate_with: a second mechanism for layers 0, 2, 4, ...; the mechanism under test then fills 1, 3, 5, ...

    Source: Arora et al. 2023 (Zoology), https://arxiv.org/abs/2312.04927, for the MQAR setting; pre-norm: Xiong et
    al. 2020, https://arxiv.org/abs/2002.04745.
    """

    slots: ClassVar[dict[str, Pattern]] = {"decoder_self": Pattern.CAUSAL_SELF}

    def __init__(
        self,
        task: TaskSpec,
        attention: Factory,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        positions: str = "none",
        state_mixer: str = "mlp",
        mlp_ratio: float = 4,
        tied_embeddings: bool = True,
        embedding_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        initialisation: str = "scaled_normal",
        alternate_with: Factory | None = None,
    ):
        super().__init__()
        for name, value, valid in (
            ("positions", positions, POSITIONS),
            ("state_mixer", state_mixer, STATE_MIXERS),
            ("initialisation", initialisation, INITIALISATIONS),
        ):
            if value not in valid:
                raise unknown(f"backbone.{name}", value, valid)
        factories = [attention] if alternate_with is None else [alternate_with, attention]
        if num_layers < len(factories):
            raise UserError(f"backbone.num_layers must be at least {len(factories)}, got {num_layers}")
        if dim < 1:
            raise UserError(f"backbone.dim must be at least 1, got {dim}")
        for name, rate in (("embedding_dropout", embedding_dropout), ("residual_dropout", residual_dropout)):
            if not 0 <= rate < 1:
                raise UserError(f"backbone.{name} must lie in [0, 1), got {rate}; nearest: 0.0")
        self.num_layers = num_layers
        self.initialisation = initialisation
        self.embedding = TokenEmbedding(task, dim, positions, embedding_dropout)
        layers = []
        for index in range(num_layers):
            kind = index % len(factories)
            try:
                spec = LayerSpec(
                    dim=dim,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    causal=True,
                    max_length=task.length,
                    rotary_base=10000.0 if positions == "rotary" else None,
                    layer=index // len(factories),
                    num_layers=len(range(kind, num_layers, len(factories))),
                )
            except ValueError as error:
                raise UserError(f"backbone: {error}") from error
            mixer = state_mixer if state_mixer != "mlp" or mlp_ratio > 0 else "none"
            layers.append(Layer(spec, factories[kind], mixer, mlp_ratio, residual_dropout))
        self.layers = nn.ModuleList(layers)
        self.head = TokenHead(task, dim, self.embedding.tokens if tied_embeddings else None)

    def forward(self, inputs: Tensor, positions: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(inputs)
        for layer in self._stack():
            x = layer(x, key_mask)
        return self.head(x, positions)

    def init_state(self, batch_size: int) -> DecodeState:
        return DecodeState(layers=tuple(layer.init_state(batch_size) for layer in self._stack()))

    def step(self, inputs: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        x = self.embedding(inputs, state.position)
        states = []
        for layer, memory in zip(self._stack(), state.layers, strict=True):
            x, memory = layer.step(x, memory)
            states.append(memory)
        return self.head(x), DecodeState(layers=tuple(states), position=state.position + 1)

    def _stack(self) -> Iterator[Layer]:
        return (layer for layer in self.layers if isinstance(layer, Layer))


class Layer(nn.Module):
    """One attention branch and one state-mixing branch, both pre-norm."""

    def __init__(self, spec: LayerSpec, attention: Factory, state_mixer: str, mlp_ratio: float, dropout: float):
        super().__init__()
        self.attention = attention(spec)
        self.attention_norm = nn.LayerNorm(spec.dim)
        self.dropout = nn.Dropout(dropout)
        self.state_mixer: nn.Module | None = None
        if state_mixer != "none":
            self.state_norm = nn.LayerNorm(spec.dim)
            self.state_mixer = nn.Identity() if state_mixer == "zoology_identity" else MLP(spec.dim, mlp_ratio)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), key_mask=key_mask))
        return self._mix_state(x)

    def init_state(self, batch_size: int) -> State:
        return self.attention.init_state(batch_size)

    def step(self, x: Tensor, memory: State) -> tuple[Tensor, State]:
        update, memory = self.attention.step(self.attention_norm(x), memory)
        return self._mix_state(x + self.dropout(update)), memory

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
