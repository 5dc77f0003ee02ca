"""What every oracle test needs: a float64 layer, and the comparison of two programs in values and gradients."""

import pytest
import torch

from attentions.base import LayerSpec


@pytest.fixture
def make_layer():
    """A layer in float64 with all parameters of order one, so that no term hides behind a small weight."""

    def make(layer_class, *, dim=60, num_heads=6, causal=True, seed=0, **keywords):
        spec_keys = {"cross", "num_kv_heads", "rotary_base"} & keywords.keys()
        spec = LayerSpec(dim=dim, num_heads=num_heads, causal=causal, **{key: keywords.pop(key) for key in spec_keys})
        torch.manual_seed(seed)
        layer = layer_class(spec, **keywords).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return layer

    return make


@pytest.fixture
def agree():
    """agree(fast, naive, inputs): equal outputs, and equal gradients of a random functional of them."""

    def compare(fast, naive, inputs, *, rtol=1e-8, atol=1e-9):  # float64: 37 steps lose a few of 16 digits
        inputs = list(inputs)
        for tensor in inputs:
            tensor.requires_grad_()
        got, want = fast(), naive()
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
        direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=want.dtype)
        got_grads = torch.autograd.grad((got * direction).sum(), inputs)
        want_grads = torch.autograd.grad((want * direction).sum(), inputs)
        for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
            assert want_grad.abs().max() > 1e-6, "an input without gradient tests nothing"
            torch.testing.assert_close(got_grad, want_grad, rtol=100 * rtol, atol=100 * atol)  # sums over all outputs

    return compare
