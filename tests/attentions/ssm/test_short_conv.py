"""Short convolution against its formula, channel by channel and position by position."""

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.ssm.short_conv import ShortConv

B, T, M = 2, 11, 6


def make(causal=True, kernel_size=3, dim=M):
    torch.manual_seed(0)
    return ShortConv(LayerSpec(dim=dim, num_heads=2, causal=causal), kernel_size=kernel_size).double()


def stream():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(layer, x, causal, kernel_size, key_mask=None):
    """y_t = (c + sum_i w_i u_{t+i-offset}) * (W u_t + b) + u_t, zeros outside the sequence and where masked."""
    offset = kernel_size - 1 if causal else kernel_size // 2
    rows = []
    for b in range(B):
        for t in range(T):
            gate = layer.gate_proj.weight @ x[b, t] + layer.gate_proj.bias
            channels = []
            for c in range(M):
                total = layer.conv.bias[c]
                for i in range(kernel_size):
                    s = t + i - offset
                    if 0 <= s < T and (key_mask is None or key_mask[b, s]):
                        total = total + layer.conv.weight[c, i] * x[b, s, c]
                channels.append(total * gate[c] + x[b, t, c])
            rows.append(torch.stack(channels))
    return torch.stack(rows).reshape(B, T, M)


@pytest.mark.parametrize(("causal", "kernel_size"), [(True, 1), (True, 3), (True, 4), (False, 3), (False, 5)])
def test_layer_equals_the_formula(causal, kernel_size):
    layer, x = make(causal, kernel_size), stream().requires_grad_()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    for key_mask in (None, mask):
        got, want = layer(x, key_mask=key_mask), naive(layer, x, causal, kernel_size, key_mask)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64, a handful of terms
        inputs = [x, *layer.parameters()]
        direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
        for a, b in zip(*(torch.autograd.grad((y * direction).sum(), inputs) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel_size", [1, 3, 4])
def test_step_by_step_equals_all_at_once_equals_prefill(kernel_size):
    layer, x = make(kernel_size=kernel_size), stream()
    want = layer(x)
    for prompt in (1, 2, 7):  # shorter and longer than the kernel
        output, state = layer.prefill(x[:, :prompt])
        torch.testing.assert_close(output, want[:, :prompt])
        for t in range(prompt, T):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.position == T and state.nbytes == B * (kernel_size - 1) * M * 8
        assert state.tail.untyped_storage().nbytes() == state.nbytes, "a view keeps all inputs alive"


def test_at_width_64_it_has_the_parameters_of_zoology_s_layer():
    assert sum(parameter.numel() for parameter in make(dim=64).parameters()) == 64 * 64 + 64 + 64 * 3 + 64


def test_what_it_cannot_be_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4; nearest: 3, 5"):
        make(causal=False, kernel_size=4)
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0"):
        make(kernel_size=0)
    with pytest.raises(UnsupportedPattern, match="causal cross"):
        ShortConv(LayerSpec(dim=M, num_heads=2, causal=True, cross=True))
