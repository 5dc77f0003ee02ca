"""Hyena against its recurrence, filter tap by filter tap and position by position."""

import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.ssm.hyena import Hyena

B, T, M, LONGEST = 2, 7, 5, 11


def make(causal=True, **keywords):
    torch.manual_seed(0)
    spec = LayerSpec(dim=M, num_heads=1, causal=causal, max_length=LONGEST)
    layer = Hyena(spec, **{"filter_order": 4, **keywords}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, torch.randn(B, T, M, dtype=torch.float64)


def filters(layer, position):
    """All taps at one distance: exp(-alpha t) times an MLP of (t, cos(2 pi f p / L), -sin(2 pi f p / L))."""
    network = layer.filter
    t = position / (LONGEST - 1)
    bands = (network.weights[0].shape[1] - 1) // 2
    wave = [1e-4 + (bands - 1 - 1e-4) * i / (bands - 1) if bands > 1 else 1e-4 for i in range(bands)]
    angle = [2 * math.pi * f * position / LONGEST for f in wave]
    h = torch.tensor([t, *map(math.cos, angle), *(-math.sin(a) for a in angle)], dtype=torch.float64)
    for i in range(len(network.biases)):
        h = torch.sin(network.frequency * (network.weights[i] @ h + network.biases[i]))
    h = network.weights[-1] @ h
    slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
    size = (layer.order - 1) * M  # filters of one direction; the others have the same windows
    alpha = [slow + (fast - slow) * c / (size - 1) for c in range(size)] * (len(h) // size)
    return h * torch.exp(-torch.tensor(alpha, dtype=torch.float64) * t)


def naive(layer, x, causal, key_mask=None):
    """z <- h^n * (x^n z) + d^n x^n z for every n but the last gate, which multiplies at the end."""
    order, size = layer.order, layer.conv.kernel_size
    offset = size - 1 if causal else size // 2
    taps = [filters(layer, p).view(-1, M, order - 1).mT for p in range(T)]  # a channel's filters are neighbours
    rows = []
    for b in range(B):
        seen = [1.0 if key_mask is None or key_mask[b, t] else 0.0 for t in range(T)]
        u = [seen[t] * (layer.in_proj.weight @ x[b, t] + layer.in_proj.bias) for t in range(T)]
        short = []
        for t in range(T):
            total = layer.conv.bias
            for i in range(size):
                if 0 <= t + i - offset < T:
                    total = total + layer.conv.weight[:, i] * u[t + i - offset]
            short.append(total.view(order + 1, M))
        z = [short[t][order] for t in range(T)]
        for n in range(order - 1):
            inputs = [seen[t] * z[t] * short[t][order - 1 - n] for t in range(T)]
            z = []
            for t in range(T):
                total = layer.skip[n] * inputs[t]
                for s in range(T):
                    if s <= t:
                        total = total + taps[t - s][0, n] * inputs[s]
                    elif not causal:
                        total = total + taps[s - t - 1][1, n] * inputs[s]
                z.append(total)
        rows += [layer.out_proj.weight @ (z[t] * short[t][0]) + layer.out_proj.bias for t in range(T)]
    return torch.stack(rows).reshape(B, T, M)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keywords", [{}, {"order": 3, "emb_dim": 7, "num_inner_layers": 0}], ids=["2", "3"])
def test_layer_equals_the_recurrence(keywords, causal, agree):
    layer, x = make(causal, **keywords)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [x, *layer.parameters()]
    for key_mask in (None, mask):
        agree(lambda m=key_mask: layer(x, key_mask=m), lambda m=key_mask: naive(layer, x, causal, m), inputs)


@pytest.mark.parametrize(("order", "conv_size"), [(2, 3), (3, 4)])
def test_prefill_and_steps_equal_all_at_once_and_keep_every_product(order, conv_size):
    layer, x = make(order=order, conv_size=conv_size)
    want = layer(x)
    for prompt in (1, 4, T):
        output, state = layer.prefill(x[:, :prompt])
        torch.testing.assert_close(output, want[:, :prompt])
        for t in range(prompt, T):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.nbytes == 8 * B * (T * (order - 1) * M + (conv_size - 1) * (order + 1) * M)


def test_a_tap_does_not_depend_on_the_length_and_ends_with_max_length():
    layer, _ = make()
    torch.testing.assert_close(layer.filter(LONGEST)[:, :3], layer.filter(3), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="the filter covers max_length=11 positions, got 12"):
        layer(torch.randn(B, LONGEST + 1, M, dtype=torch.float64))


def test_the_window_falls_to_a_hundredth_between_a_third_and_one_and_a_half_times_the_length():
    layer = Hyena(LayerSpec(dim=M, num_heads=1, causal=True, max_length=101))
    with torch.no_grad():
        layer.filter.weights[-1].fill_(0.0)
        layer.filter.weights[-1][:, 0] = 1.0  # every filter is the same function of time, but for its window
        taps = layer.filter(101)
    torch.testing.assert_close(taps[0, 50] / taps[-1, 50], torch.tensor(100 ** (0.5 / 0.3 - 0.5 / 1.5)))


@pytest.mark.parametrize(("order", "causal"), [(2, False), (3, True), (4, False)])
def test_every_long_convolution_and_direction_has_slow_and_fast_windows(order, causal):
    layer = Hyena(LayerSpec(dim=64, num_heads=1, causal=causal, max_length=101), order=order)
    with torch.no_grad():
        layer.filter.weights[-1].fill_(0.0)
        layer.filter.weights[-1][:, 0] = 1.0
        taps = layer._filters(101)
    rate = (taps[..., 20] / taps[..., 70]).log() / 0.5  # one function of time for all: they differ by windows alone
    span = math.log(100) / 0.3 - math.log(100) / 1.5
    assert (rate.amax(-1) - rate.amin(-1) > 0.95 * span).all()


def test_parameters_are_those_of_the_published_layer():
    layer = Hyena(LayerSpec(dim=64, num_heads=2, causal=True))
    network = 3 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 64 + 64
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 64**2 + 17 * 64 + network


def test_what_it_cannot_be_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="order must be at least 2, got 1"):
        make(order=1)
    with pytest.raises(ValueError, match=r"emb_dim must be odd .*, got 4; nearest: 3, 5"):
        make(emb_dim=4)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        make(causal=False, conv_size=4)
    with pytest.raises(UnsupportedPattern, match="a filter needs a distance"):
        Hyena(LayerSpec(dim=M, num_heads=1, causal=True, cross=True))
