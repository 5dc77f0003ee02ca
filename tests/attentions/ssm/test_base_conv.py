"""BaseConv against its formula, channel by channel and position by position."""

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.ssm.base_conv import BaseConv

B, T, M = 2, 11, 6


def stream():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(layer, x, causal, kernel_size, activation, key_mask=None):
    """[(W_1 x_t + b_1) * f(sum_i w_i (W_2 x_{t+i-offset} + b_2))] W_o + b_o; nothing outside and where masked."""
    offset = kernel_size - 1 if causal else kernel_size // 2
    rows = []
    for b in range(B):
        for t in range(T):
            local = []
            for c in range(layer.conv.weight.shape[0]):
                total = torch.zeros((), dtype=x.dtype)
                for i in range(kernel_size):
                    s = t + i - offset
                    if 0 <= s < T and (key_mask is None or key_mask[b, s]):
                        value = layer.value_proj.weight[c] @ x[b, s] + layer.value_proj.bias[c]
                        total = total + layer.conv.weight[c, i] * value
                local.append(total * total.sigmoid() if activation == "silu" else total)
            gate = layer.gate_proj.weight @ x[b, t] + layer.gate_proj.bias
            rows.append(layer.out_proj.weight @ (gate * torch.stack(local)) + layer.out_proj.bias)
    return torch.stack(rows).reshape(B, T, M)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize(
    ("causal", "kernel_size", "expand"), [(True, 3, 4), (True, 1, 3), (False, 3, 2), (False, 5, 1)]
)
def test_layer_equals_the_formula(causal, kernel_size, expand, activation, make_layer, agree):
    settings = dict(causal=causal, kernel_size=kernel_size, expand=expand, activation=activation)
    layer, x = make_layer(BaseConv, dim=M, num_heads=2, **settings), stream()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    for key_mask in (None, mask):
        agree(
            lambda key_mask=key_mask: layer(x, key_mask=key_mask),
            lambda key_mask=key_mask: naive(layer, x, causal, kernel_size, activation, key_mask),
            [x, *layer.parameters()],
        )


@pytest.mark.parametrize("kernel_size", [1, 3, 4])
def test_step_by_step_equals_all_at_once_equals_prefill(kernel_size, make_layer):
    layer, x = make_layer(BaseConv, dim=M, num_heads=2, kernel_size=kernel_size), stream()
    want = layer(x)
    for prompt in (1, 2, 7):  # shorter and longer than the kernel
        output, state = layer.prefill(x[:, :prompt])
        torch.testing.assert_close(output, want[:, :prompt])
        for t in range(prompt, T):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.position == T and state.nbytes == B * (kernel_size - 1) * 2 * M * 8


def test_the_360m_layer_has_the_parameters_of_the_authors_code():
    """in_proj of 1024 x 4096 and out_proj of 2048 x 1024 with biases, a kernel of 3 on 2048 channels without."""
    layer = BaseConv(LayerSpec(dim=1024, num_heads=16, causal=True))
    count = sum(parameter.numel() for parameter in layer.parameters())
    assert count == (1024 * 4096 + 4096) + (2048 * 1024 + 1024) + 2048 * 3


def test_what_it_cannot_be_is_refused_with_the_way_out():
    spec = LayerSpec(dim=5, num_heads=1, causal=True)
    with pytest.raises(ValueError, match="expand \\* dim must be even and at least 2, got expand=3; nearest: 4"):
        BaseConv(spec, expand=3)
    with pytest.raises(ValueError, match="expand \\* dim must be even and at least 2, got expand=0; nearest: 2"):
        BaseConv(spec, expand=0)
    with pytest.raises(ValueError, match="activation must be one of silu, none, got relu"):
        BaseConv(spec, activation="relu")
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4; nearest: 3, 5"):
        BaseConv(LayerSpec(dim=6, num_heads=2, causal=False), kernel_size=4)
    with pytest.raises(UnsupportedPattern, match="a kernel needs a distance"):
        BaseConv(LayerSpec(dim=6, num_heads=2, causal=True, cross=True))
