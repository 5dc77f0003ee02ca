"""A pre-norm encoder: every position reads the whole sequence."""

from __future__ import annotations

from typing import ClassVar

from attentions.base import Pattern
from bench.backbones.stack import Stack


class Encoder(Stack):
    """A stack that reads both directions: logits at labelled positions, or one for the pooled sequence.

    Padding is masked in every layer and in the pooling. It does not decode.

    Source: Devlin et al. 2018, https://arxiv.org/abs/1810.04805, with the norms before the branches.
    """

    pattern = Pattern.NONCAUSAL_SELF
    slots: ClassVar[dict[str, Pattern]] = {"encoder_self": Pattern.NONCAUSAL_SELF}
