"""An encoder over the context and an autoregressive decoder that reads it: three slots, one of them under test."""

from __future__ import annotations

import functools
from typing import ClassVar

from torch import Tensor, nn

from attentions.base import Factory, LayerSpec, Pattern
from bench.backbones.base import Backbone, DecodeState
from bench.backbones.embed import POSITIONS, Embedding
from bench.backbones.heads import TokenHead
from bench.backbones.initialise import INITIALISATIONS
from bench.backbones.layers import NORMS, STATE_MIXERS, Layer, alternating, check_settings, make_norm, slot_spec
from bench.errors import UserError
from tasks.base import PerToken, TaskSpec


class EncoderDecoder(Backbone):
    """Encoder layers over the context; decoder layers of causal self-attention, cross-attention and a state mixer.

    The mechanism under test fills the slot named by `slot`, `others` fills the other two: CAB's leaderboards by pattern
    from one network.

    Args:
        task: a causal task with a context; both share the token embedding.
        attention: makes the layer of the slot under test.
        slot: encoder_self, decoder_self or cross.
        others: the mechanism of the other slots.
        num_encoder_layers, num_layers: depth of encoder and decoder.
        alternate_with: a mechanism that takes encoder layers 0, 2, 4, ..., such as a short convolution.
        dim, num_heads, num_kv_heads, positions, state_mixer, mlp_ratio, tied_embeddings, embedding_dropout,
            residual_dropout, initialisation, norm: as in `bench.backbones.stack`.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, with the norms before the branches; slots: CAB
    (Zhang et al. 2022, https://arxiv.org/abs/2210.07661).
    """

    slots: ClassVar[dict[str, Pattern]] = {
        "encoder_self": Pattern.NONCAUSAL_SELF,
        "decoder_self": Pattern.CAUSAL_SELF,
        "cross": Pattern.CAUSAL_CROSS,
    }

    def __init__(
        self,
        task: TaskSpec,
        attention: Factory,
        *,
        slot: str,
        others: Factory,
        dim: int,
        num_encoder_layers: int,
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
        norm: str = "layer_norm",
        alternate_with: Factory | None = None,
    ):
        super().__init__()
        if task.context is None:
            raise UserError("backbone encoder_decoder reads a context and the task has none; type backbone=decoder")
        if not isinstance(task.output, PerToken):
            raise UserError("backbone encoder_decoder answers per token and the task has one label per sequence")
        check_settings(
            dim=dim,
            words={
                "slot": (slot, tuple(self.slots)),
                "positions": (positions, POSITIONS),
                "state_mixer": (state_mixer, STATE_MIXERS),
                "initialisation": (initialisation, INITIALISATIONS),
                "norm": (norm, NORMS),
            },
            rates={"embedding_dropout": embedding_dropout, "residual_dropout": residual_dropout},
            depths={"num_layers": num_layers, "num_encoder_layers": num_encoder_layers},
        )
        self.num_layers = num_encoder_layers + num_layers
        self.initialisation = initialisation
        spec_of = functools.partial(
            slot_spec, task, dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions
        )
        fill = {name: attention if name == slot else others for name in self.slots}
        length = task.context_length or task.length
        self.embedding = Embedding(task.inputs, task.length, dim, positions, embedding_dropout)
        self.context_embedding = Embedding(
            task.context, length, dim, positions, embedding_dropout, self.embedding.tokens
        )
        encoder = []
        for factory, index, count in alternating(fill["encoder_self"], alternate_with, num_encoder_layers):
            spec = spec_of(self.slots["encoder_self"], layer=index, num_layers=count, on_context=True)
            encoder.append(Layer(dim, factory(spec), state_mixer, mlp_ratio, residual_dropout, norm=norm))
        decoder = []
        for index in range(num_layers):
            specs: dict[str, LayerSpec] = {
                name: spec_of(self.slots[name], layer=index, num_layers=num_layers)
                for name in ("decoder_self", "cross")
            }
            own, cross = (fill[name](spec) for name, spec in specs.items())
            decoder.append(Layer(dim, own, state_mixer, mlp_ratio, residual_dropout, cross, norm=norm))
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.context_norm = make_norm(norm, dim)
        self.head = TokenHead(task, make_norm(norm, dim), dim, self.embedding.tokens if tied_embeddings else None)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        c = self._encode(context, context_mask)
        x = self.embedding(inputs)
        for layer in self.decoder:
            x = layer(x, key_mask, context=c, context_mask=context_mask)
        return self.head(x, positions)

    def init_state(
        self, batch_size: int, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> DecodeState:
        c = self._encode(context, context_mask)
        return DecodeState(
            layers=tuple(
                layer.init_state(batch_size, c, context_mask) for layer in self.decoder if isinstance(layer, Layer)
            )
        )

    def step(self, inputs: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        x = self.embedding(inputs, state.position)
        states = []
        for layer, memory in zip(self.decoder, state.layers, strict=True):
            assert isinstance(layer, Layer)
            x, memory = layer.step(x, memory)
            states.append(memory)
        return self.head(x), DecodeState(layers=tuple(states), position=state.position + 1)

    def _encode(self, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        if context is None:
            raise ValueError("an encoder-decoder reads a context: init_state(batch_size, context)")
        c = self.context_embedding(context)
        for layer in self.encoder:
            c = layer(c, context_mask)
        return self.context_norm(c)
