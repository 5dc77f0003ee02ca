"""A stack of queries over a separate context: cross-attention and nothing else between positions."""

from __future__ import annotations

import functools
from typing import ClassVar

from torch import Tensor, nn

from attentions.base import Factory, Pattern
from bench.backbones.base import Backbone
from bench.backbones.embed import Embedding
from bench.backbones.heads import POOLINGS, make_head
from bench.backbones.initialise import INITIALISATIONS
from bench.backbones.layers import NORMS, STATE_MIXERS, Layer, check_settings, make_norm, slot_spec
from bench.errors import UserError
from tasks.base import TaskSpec

POSITIONS = ("none", "learned")  # rotary positions need one sequence


class Cross(Backbone):
    """x <- x + attention(LN(x), LN(c)); x <- x + state_mixer(LN(x)): queries x read a context c; noncausal.

    The context passes one layer of `context_mixer` and is then the same for every layer. Queries are a set: they have
    no positions and meet each other only where the mechanism mixes them.

    Args:
        task: inputs, context and classes; both share the token embedding.
        attention: makes the layer of a slot.
        context_mixer: noncausal self-attention of the context with itself, such as a short convolution; null: none.
        positions: of the context, none or learned.
        dim, num_layers, num_heads, num_kv_heads, state_mixer, mlp_ratio, pooling, tied_embeddings, embedding_dropout,
            residual_dropout, initialisation, norm: as in `bench.backbones.stack`.

    Source: ours, the noncausal cross slot of CAB (Zhang et al. 2022, https://arxiv.org/abs/2210.07661) on its own, in
    the shape of Perceiver's reads (Jaegle et al. 2021, https://arxiv.org/abs/2103.03206).
    """

    slots: ClassVar[dict[str, Pattern]] = {"cross": Pattern.NONCAUSAL_CROSS}

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
        pooling: str = "mean",
        tied_embeddings: bool = True,
        embedding_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        initialisation: str = "scaled_normal",
        norm: str = "layer_norm",
        context_mixer: Factory | None = None,
    ):
        super().__init__()
        if task.context is None:
            raise UserError("backbone cross reads a context and the task has none; type backbone=encoder")
        if task.causal:
            raise UserError("backbone cross lets queries meet and the task forbids it; type backbone=encoder_decoder")
        check_settings(
            dim=dim,
            words={
                "positions": (positions, POSITIONS),
                "state_mixer": (state_mixer, STATE_MIXERS),
                "pooling": (pooling, POOLINGS),
                "initialisation": (initialisation, INITIALISATIONS),
                "norm": (norm, NORMS),
            },
            rates={"embedding_dropout": embedding_dropout, "residual_dropout": residual_dropout},
            depths={"num_layers": num_layers},
        )
        self.num_layers = num_layers
        self.initialisation = initialisation
        slot = functools.partial(
            slot_spec, task, dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions
        )
        length = task.context_length or task.length
        self.embedding = Embedding(task.inputs, task.length, dim, "none", embedding_dropout)
        self.context_embedding = Embedding(
            task.context, length, dim, positions, embedding_dropout, self.embedding.tokens
        )
        self.context_layer: Layer | None = None
        if context_mixer is not None:
            mixer = context_mixer(slot(Pattern.NONCAUSAL_SELF, on_context=True))
            self.context_layer = Layer(dim, mixer, "none", 0, residual_dropout, norm=norm)
        layers = []
        for index in range(num_layers):
            spec = slot(self.slots["cross"], layer=index, num_layers=num_layers)
            layers.append(Layer(dim, attention(spec), state_mixer, mlp_ratio, residual_dropout, norm=norm))
        self.layers = nn.ModuleList(layers)
        self.context_norm = make_norm(norm, dim)
        self.head = make_head(
            task, make_norm(norm, dim), dim, pooling, self.embedding.tokens if tied_embeddings else None
        )

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        assert context is not None
        c = self.context_embedding(context)
        if self.context_layer is not None:
            c = self.context_layer(c, context_mask)
        c = self.context_norm(c)
        x = self.embedding(inputs)
        for layer in self.layers:
            x = layer(x, context=c, context_mask=context_mask)
        return self.head(x, positions, key_mask)
