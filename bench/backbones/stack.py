"""A stack of layers over one sequence: what decoder and encoder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from attentions.base import Attention, Factory, Pattern
from bench.backbones.base import Backbone
from bench.backbones.embed import POSITIONS, Embedding
from bench.backbones.heads import POOLINGS, make_head
from bench.backbones.initialise import INITIALISATIONS
from bench.backbones.layers import NORMS, STATE_MIXERS, Layer, alternating, check_settings, make_norm, slot_spec, within
from bench.errors import UserError
from tasks.base import TaskSpec


class Stack(Backbone):
    """x <- x + attention(LN(x)); x <- x + state_mixer(LN(x)); after the last layer LN and the head.

    Args:
        task: inputs, classes and the longest input.
        attention: makes the layer of a slot.
        dim, num_layers, num_heads, num_kv_heads: M, depth, H, G.
        positions: none, learned (absolute) or rotary.
        state_mixer: mlp (GELU, width mlp_ratio * dim); sglu (a gated linear unit of that width); none;
            zoology_identity, which adds LN(x) itself to the stream: what `state_mixer=Identity` does in Zoology, and
            needed to reproduce its cells.
        mlp_ratio: width of the MLP or SGLU in units of dim; 0 means neither.
        pooling: what a task with one label per sequence reads: mean (over unmasked positions), first or last.
        head_widths: of hidden layers between that and the label, each with a ReLU.
        tied_embeddings: the head shares the token embedding.
        embedding_dropout, residual_dropout: after the embedding; on every branch before it joins the stream.
        initialisation: scaled_normal or native, see `bench.backbones.initialise`.
        norm: layer_norm or simple_rms_norm (no weight), before every branch and the head.
        block: a mechanism that holds another one, `block(spec, mixer=...)`, such as MambaOut's gated block; it stands
            in every layer of the mechanism under test, and that mechanism inside of it.
        alternate_with: a second mechanism for layers 0, 2, 4, ...; the mechanism under test then fills 1, 3, 5, ...
    """

    pattern: ClassVar[Pattern]

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
        head_widths: Sequence[int] = (),
        tied_embeddings: bool = True,
        embedding_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        initialisation: str = "scaled_normal",
        norm: str = "layer_norm",
        block: Callable[..., Attention] | None = None,
        alternate_with: Factory | None = None,
    ):
        super().__init__()
        if task.context is not None:
            raise UserError(
                f"backbone {type(self).__name__.lower()} reads one sequence and the task has a context; "
                "type backbone=cross or backbone=encoder_decoder"
            )
        if task.causal and self.pattern == Pattern.NONCAUSAL_SELF:
            raise UserError(
                f"backbone {type(self).__name__.lower()} reads the whole sequence and the task forbids looking ahead; "
                "type backbone=decoder"
            )
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
            depths={},
        )
        self.num_layers = num_layers
        self.initialisation = initialisation
        self.embedding = Embedding(task.inputs, task.length, dim, positions, embedding_dropout)
        layers = []
        for factory, index, count in alternating(within(block, attention), alternate_with, num_layers):
            spec = slot_spec(
                task,
                self.pattern,
                dim=dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                positions=positions,
                layer=index,
                num_layers=count,
            )
            layers.append(Layer(dim, factory(spec), state_mixer, mlp_ratio, residual_dropout, norm=norm))
        self.layers = nn.ModuleList(layers)
        tied = self.embedding.tokens if tied_embeddings else None
        self.head = make_head(task, make_norm(norm, dim), dim, pooling, tied, head_widths)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.embedding(inputs)
        for layer in self._stack():
            x = layer(x, key_mask)
        return self.head(x, positions, key_mask)

    def _stack(self) -> Iterator[Layer]:
        return (layer for layer in self.layers if isinstance(layer, Layer))
