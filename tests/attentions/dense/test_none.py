"""No attention: no parameters, no state, no information from other positions."""

import torch

from attentions.base import LayerSpec
from attentions.dense.none import NoAttention


def test_it_returns_zeros_without_parameters_or_state_bytes():
    layer = NoAttention(LayerSpec(dim=42, num_heads=3, causal=True))
    x = torch.randn(2, 11, 42)
    assert layer(x).equal(torch.zeros(2, 11, 42)) and not list(layer.parameters())
    output, state = layer.prefill(x)
    assert output.equal(torch.zeros(2, 11, 42)) and state.nbytes == 0 and state.position == 11
