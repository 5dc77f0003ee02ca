"""Hybrids: mechanisms that alternate over the layers of a stack."""

from __future__ import annotations

from collections.abc import Sequence

from attentions.base import Attention, Factory, LayerSpec, Unsupported


def hybrid(spec: LayerSpec, *, layers: Sequence[Factory]) -> Attention:
    """Layer i of the stack is `layers[i mod n]`: [short_conv, based] is one conv layer and one Based layer.

    Args:
        spec: the slot; its `layer` chooses.
        layers: mechanisms as factories, at least one.

    Raises:
        Unsupported: the mechanism has fewer layers than there are mechanisms to alternate; on a backbone that brings a
            convolution of its own, a two-layer hybrid would silently be its first member.

    Source: Arora et al. 2024 (Based), https://arxiv.org/abs/2402.18668, section 5; in their MQAR plots every row
    is one short-convolution layer and one layer of the named mechanism.
    """
    if not layers:
        raise ValueError("hybrid needs at least one mechanism in layers=[...]")
    if spec.num_layers < len(layers):
        raise Unsupported(
            f"a hybrid of {len(layers)} needs at least {len(layers)} layers, the backbone gives it {spec.num_layers}; "
            "use backbone=bare_decoder or raise backbone.num_layers"
        )
    return layers[spec.layer % len(layers)](spec)
