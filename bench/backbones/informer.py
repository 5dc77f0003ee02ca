"""Informer: an encoder that halves its window from layer to layer, and a decoder that gives all steps at once."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.base import Factory, Pattern
from bench.backbones.base import Backbone
from bench.backbones.heads import TokenHead
from bench.backbones.initialise import INITIALISATIONS
from bench.backbones.layers import NORMS, STATE_MIXERS, Layer, check_settings, make_norm, slot_spec
from bench.errors import UserError
from tasks.base import TaskSpec, Values, Vectors

POSITIONS = ("none", "learned", "sinusoidal")


class Informer(Backbone):
    """Encoder layers over a window of the past; decoder layers of masked self-attention and cross-attention to it.

    The decoder's inputs hold the end of the window and a blank for each step ahead; one forward answers all blanks. The
    mechanism under test fills the slot named by `slot`, `others` fills the other two. Only `decoder_self` is causal.

    Args:
        task: real inputs, a context and values to predict; it may not forbid looking ahead.
        attention: makes the layer of the slot under test.
        slot: encoder_self, decoder_self or cross.
        others: the mechanism of the other slots.
        num_encoder_layers, num_layers: depth of encoder and decoder.
        distilling: between two encoder layers, convolution, batch norm, ELU and a max pool that halves the length.
        value_kernel: width of the circular convolution that embeds the values, odd; 1 is a linear layer.
        positions: none, learned or sinusoidal.
        dim, num_heads, num_kv_heads, state_mixer, mlp_ratio, embedding_dropout, residual_dropout, initialisation,
            norm: as in `bench.backbones.stack`.

    Source: Zhou et al. 2020, https://arxiv.org/abs/2012.07436, sections 3.2 and 3.3, appendix B, and its code
    (models/model.py, embed.py, encoder.py). Differs: norms stand before the branches, not behind; the decoder's
    heads are not interleaved before the projection (`mix`); positions and calendar marks as in the code, where marks
    pass one linear layer.
    """

    slots: ClassVar[dict[str, Pattern]] = {
        "encoder_self": Pattern.NONCAUSAL_SELF,
        "decoder_self": Pattern.CAUSAL_SELF,
        "cross": Pattern.NONCAUSAL_CROSS,
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
        distilling: bool = True,
        value_kernel: int = 3,
        positions: str = "sinusoidal",
        state_mixer: str = "mlp",
        mlp_ratio: float = 4,
        embedding_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        initialisation: str = "native",
        norm: str = "layer_norm",
    ):
        super().__init__()
        if task.context is None:
            raise UserError("backbone informer reads a window as context and the task has none; type backbone=encoder")
        if not (isinstance(task.output, Values) and isinstance(task.inputs, Vectors)):
            raise UserError("backbone informer takes real numbers to values; type backbone=encoder_decoder or cross")
        if task.causal:
            raise UserError("backbone informer answers all steps at once; type backbone=encoder_decoder")
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
        if value_kernel < 1 or value_kernel % 2 == 0:
            raise UserError(
                f"backbone.value_kernel must be odd, got {value_kernel}; nearest: {max(1, value_kernel - 1)}"
            )
        self.num_layers = num_encoder_layers + num_layers
        self.initialisation = initialisation
        length = task.context_length or task.length
        # convolutions draw in their constructors: before any mechanism does, so that they are the same for all
        embedding = functools.partial(
            SeriesEmbedding, dim=dim, kernel_size=value_kernel, positions=positions, dropout=embedding_dropout
        )
        assert isinstance(task.context, Vectors)
        self.embedding, self.context_embedding = embedding(task.inputs, task.length), embedding(task.context, length)
        self.distillers = nn.ModuleList(Distiller(dim) for _ in range(num_encoder_layers - 1) if distilling)

        shape: dict[str, Any] = dict(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions)
        fill = {name: attention if name == slot else others for name in self.slots}
        encoder = []
        for index in range(num_encoder_layers):
            task = replace(task, context_length=length)
            pattern = self.slots["encoder_self"]
            spec = slot_spec(task, pattern, layer=index, num_layers=num_encoder_layers, on_context=True, **shape)
            encoder.append(Layer(dim, fill["encoder_self"](spec), state_mixer, mlp_ratio, residual_dropout, norm=norm))
            length = -(-length // 2) if distilling else length
        decoder = []
        for index in range(num_layers):
            own, cross = (
                fill[name](slot_spec(task, self.slots[name], layer=index, num_layers=num_layers, **shape))
                for name in ("decoder_self", "cross")
            )
            decoder.append(Layer(dim, own, state_mixer, mlp_ratio, residual_dropout, cross, norm=norm))
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.context_norm = make_norm(norm, dim)
        self.head = TokenHead(task, make_norm(norm, dim), dim, None)

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
        c = self.context_embedding(context, context_mask)
        for index, layer in enumerate(self.encoder):
            c = layer(c, context_mask)
            if index < len(self.distillers):
                c, context_mask = self.distillers[index](c, context_mask)
        c = self.context_norm(c)
        x = self.embedding(inputs, key_mask)
        for layer in self.decoder:
            x = layer(x, key_mask, context=c, context_mask=context_mask)
        return self.head(x, positions)


class SeriesEmbedding(nn.Module):
    """Values through a circular convolution, calendar marks through a linear layer, and positions: [B, L, M].

    Args:
        inputs: [B, L, F], the last `inputs.num_marks` of F numbers are marks.
        length: longest input.
        kernel_size: of the convolution.
        positions: none, learned or sinusoidal.
        dropout: after the sum.
    """

    codes: Tensor  # [length, M]

    def __init__(self, inputs: Vectors, length: int, dim: int, kernel_size: int, positions: str, dropout: float):
        super().__init__()
        self.num_values = inputs.dim - inputs.num_marks
        self.values = _circular(self.num_values, dim, kernel_size)
        self.marks = nn.Linear(inputs.num_marks, dim, bias=False) if inputs.num_marks else None
        self.positions = nn.Embedding(length, dim) if positions == "learned" else None
        codes = sinusoids(length, dim) if positions == "sinusoidal" else torch.zeros(1, dim)
        self.register_buffer("codes", codes, persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        values = inputs[..., : self.num_values]
        if mask is not None:
            values = values.masked_fill(~mask[..., None], 0.0)
        x = self.values(values.mT).mT
        if self.marks is not None:
            x = x + self.marks(inputs[..., self.num_values :])
        table = self.codes if self.positions is None else self.positions.weight
        return self.dropout(x + table[: inputs.shape[1]])


class Distiller(nn.Module):
    """Convolution of three, batch norm, ELU, max pool of three: [B, L, M] -> [B, ceil(L / 2), M].

    Source: Zhou et al. 2020, https://arxiv.org/abs/2012.07436, equation 5; circular padding and batch norm as in its
    code (models/encoder.py). A masked position counts as zero, and an output is real where one of its three inputs is.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.convolution = _circular(dim, dim, 3)
        self.norm = nn.BatchNorm1d(dim)
        self.activation = nn.ELU()
        self.pool = nn.MaxPool1d(3, stride=2, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
            mask = self.pool(mask[:, None].to(x.dtype))[:, 0] > 0
        return self.pool(self.activation(self.norm(self.convolution(x.mT)))).mT, mask


def _circular(num_inputs: int, dim: int, kernel_size: int) -> nn.Conv1d:
    """A convolution whose window runs from the end on to the start, in He's initialisation."""
    convolution = nn.Conv1d(num_inputs, dim, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="leaky_relu")
    return convolution


def sinusoids(length: int, dim: int) -> Tensor:
    """Positions [length, dim]: sin at even and cos at odd channels, wavelengths from 2 pi to 20000 pi.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5.
    """
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :dim]
