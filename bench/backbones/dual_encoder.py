"""One encoder for both sequences of a pair, and a head that compares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import Attention, Factory
from bench.backbones.encoder import Encoder
from bench.backbones.heads import Classifier, SequenceHead, check_widths
from bench.backbones.layers import check_settings, make_norm
from bench.errors import UserError
from tasks.base import PerSequence, TaskSpec

FEATURES = ("matched", "concatenated")


class DualEncoder(Encoder):
    """Inputs and context pass the same encoder, apart from each other; an MLP reads features of the two pooled ends.

    No position of one sequence sees the other, so what the pair has in common must fit into two vectors. Both run
    through the layers as one batch of twice the size, the shorter one padded under the mask.

    Args:
        task: inputs and a context of the same kind, one label per pair.
        attention: makes the layer of the slot.
        features: matched, [x1, x2, x1 * x2, x1 - x2] as in the paper of Long Range Arena, or concatenated, [x1, x2] as
            in its code.
        head_widths: of the MLP's hidden layers, each with a ReLU.
        dim, num_layers, num_heads, num_kv_heads, positions, state_mixer, mlp_ratio, pooling, embedding_dropout,
            residual_dropout, initialisation, norm, block, alternate_with: as in `bench.backbones.stack`.

    Source: Tay et al. 2020 (Long Range Arena), https://arxiv.org/abs/2011.04006, section 2.2.3 (byte-level document
    retrieval); code: https://github.com/google-research/long-range-arena, models/layers/common_layers.py, whose head
    has hidden layers of widths m and m / 2. Differs: the last norm follows the pooling, as in our encoder.
    """

    def __init__(
        self,
        task: TaskSpec,
        attention: Factory,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        features: str = "matched",
        head_widths: Sequence[int] = (),
        num_kv_heads: int | None = None,
        positions: str = "none",
        state_mixer: str = "mlp",
        mlp_ratio: float = 4,
        pooling: str = "mean",
        embedding_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        initialisation: str = "scaled_normal",
        norm: str = "layer_norm",
        block: Callable[..., Attention] | None = None,
        alternate_with: Factory | None = None,
    ):
        if task.context is None or not isinstance(task.output, PerSequence):
            raise UserError(
                "backbone dual_encoder compares two sequences and the task has no pairs; type backbone=encoder"
            )
        if task.context != task.inputs:
            raise UserError(
                f"backbone dual_encoder has one embedding for both sequences, got {task.inputs} and {task.context}; "
                "type backbone=cross"
            )
        check_widths(head_widths)
        check_settings(dim=dim, words={"features": (features, FEATURES)}, rates={}, depths={})
        longest = max(task.length, task.context_length or 0)
        super().__init__(
            dataclasses.replace(task, length=longest, context=None, context_length=None),
            attention,
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            positions=positions,
            state_mixer=state_mixer,
            mlp_ratio=mlp_ratio,
            pooling=pooling,
            tied_embeddings=False,
            embedding_dropout=embedding_dropout,
            residual_dropout=residual_dropout,
            initialisation=initialisation,
            norm=norm,
            block=block,
            alternate_with=alternate_with,
        )
        self.head = SequenceHead(task, make_norm(norm, dim), dim, pooling)
        self.head.register_module("project", Comparison(dim, task.output.num_classes, features, head_widths))

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
        both = [inputs, context]
        masks = [key_mask, context_mask]
        longest = max(inputs.shape[1], context.shape[1])
        mask = None
        if inputs.shape != context.shape or key_mask is not None or context_mask is not None:
            known = [
                torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if m is None else m
                for x, m in zip(both, masks, strict=True)
            ]
            mask = torch.cat([F.pad(m, (0, longest - m.shape[1])) for m in known])
        both = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, longest - x.shape[1])) for x in both]
        return super().forward(torch.cat(both), key_mask=mask)


class Comparison(Classifier):
    """The ends of both sequences [2B, 1, M], first ones first -> logits [B, 1, C]: features, then an MLP with ReLU."""

    def __init__(self, dim: int, num_classes: int, features: str, widths: Sequence[int]):
        matched = features == "matched"
        super().__init__(dim * (4 if matched else 2), num_classes, widths)
        self.matched = matched

    def forward(self, ends: Tensor) -> Tensor:
        x1, x2 = ends.chunk(2)
        return super().forward(torch.cat([x1, x2, x1 * x2, x1 - x2] if self.matched else [x1, x2], -1))
