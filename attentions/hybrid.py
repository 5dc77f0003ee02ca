"""Hybrids: mechanisms that alternate over the layers of a stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attentions.base import Attention, LayerSpec


def hybrid(spec: LayerSpec, *, layers: Sequence[Callable[[LayerSpec], Attention]]) -> Attention:
    """Layer i of the stack is `layers[i mod n]`: [short_conv, based] is one conv layer and one Based layer.

    Args:
        spec: the slot; its `layer` chooses.
        layers: mechanisms as factories, at least one.

    Source: Arora et al. 2024 (Based), https://arxiv.org/abs/2402.18668, section 5; in their MQAR plots every row
    is one short-convolution layer and one layer of the named mechanism.
    """
    if not layers:
        raise ValueError("hybrid needs at least one mechanism in layers=[...]")
    return layers[spec.layer % len(layers)](spec)
