"""GAAM against products and sums of Gaussian densities, number by number."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.gaam import GAAM, FeatureGAAM

B, T, M = 2, 7, 5


def make(kind=GAAM, causal=False, dim=M, **keywords):
    torch.manual_seed(0)
    layer = kind(LayerSpec(dim=dim, num_heads=1, causal=causal), **keywords).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, torch.randn(B, T, dim, dtype=torch.float64)


def density(layer, x, mean, variance, head):
    """prod (or sum) over i of exp(-y_i^2 / (2 c_i^2)) / sqrt(2 pi c_i^2), y_i = (x - (mean + delta_i)) / std."""
    gaussians = layer.gaussians
    factors = []
    for offset, log_scale in zip(gaussians.offset[head], gaussians.log_scale[head], strict=True):
        c = torch.exp(log_scale)
        y = (x - (mean + offset)) / (variance + 1e-8) ** 0.5
        factors.append(torch.exp(-(y**2) / (2 * c**2)) / torch.sqrt(2 * math.pi * c**2))
    return math.prod(factors) if gaussians.combine == "product" else sum(factors)


def weighed(layer, numbers, head):
    """The output of one piece, given as a list of numbers."""
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / max(1, len(numbers) - 1)
    weights = [density(layer, x, mean, variance, head) for x in numbers]
    return [x * w / sum(weights) for x, w in zip(numbers, weights, strict=True)]


def pieces(length, heads):
    size = length // heads
    return [range(h * size, length if h == heads - 1 else (h + 1) * size) for h in range(heads)]


def along_time(layer, x, mask=None):
    output = torch.zeros_like(x)
    for b in range(B):
        for c in range(x.shape[2]):
            for head, piece in enumerate(pieces(T, len(layer.gaussians.offset))):
                kept = [t for t in piece if mask is None or mask[b, t]]
                for t, y in zip(kept, weighed(layer, [x[b, t, c] for t in kept], head) if kept else [], strict=True):
                    output[b, t, c] = y
    return output


def running(layer, x, mask=None):
    output = torch.zeros_like(x)
    for b in range(B):
        for c in range(x.shape[2]):
            numbers, norm = [], 0.0
            for t in range(T):
                if mask is None or mask[b, t]:
                    numbers.append(x[b, t, c])
                    mean = sum(numbers) / len(numbers)
                    variance = sum((y - mean) ** 2 for y in numbers) / (len(numbers) - 1) if numbers[1:] else 1.0
                    weight = density(layer, numbers[-1], mean, variance, 0)
                    norm = norm + weight
                    output[b, t, c] = numbers[-1] * weight / norm
    return output


def along_channels(layer, x):
    output = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for head, piece in enumerate(pieces(x.shape[2], len(layer.gaussians.offset))):
                for c, y in zip(piece, weighed(layer, [x[b, t, c] for c in piece], head), strict=True):
                    output[b, t, c] = y
    return output


MASK = torch.tensor([[False, True, True, True, False, True, True], [True, True, False, True, True, True, False]])
FORMS = [(1, "product"), (3, "product"), (3, "sum")]


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize(("num_gaussians", "combine"), FORMS)
def test_time_is_weighted_by_densities_around_its_mean(num_gaussians, combine, num_heads, mask, agree):
    layer, x = make(num_heads=num_heads, num_gaussians=num_gaussians, combine=combine)
    agree(lambda: layer(x, key_mask=mask), lambda: along_time(layer, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("num_gaussians", "combine"), FORMS)
def test_causal_weights_come_from_running_statistics(num_gaussians, combine, mask, agree):
    layer, x = make(causal=True, num_gaussians=num_gaussians, combine=combine)
    agree(lambda: layer(x, key_mask=mask), lambda: running(layer, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("offset", [0.0, 0.01, 0.3])
def test_float32_gradients_of_running_weights_are_those_of_float64(offset):
    """From the first position on, where a standardised offset has no spread to be measured by."""
    layer, x = make(causal=True, num_gaussians=5)
    with torch.no_grad():
        layer.gaussians.offset.fill_(offset)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        inputs = [x.to(dtype).requires_grad_(), *layer.to(dtype).parameters()]
        gradients.append(torch.autograd.grad(layer(inputs[0]).square().sum(), inputs))
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        assert wanted.abs().max() < 1e3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_gaussians", "combine"), FORMS)
def test_channels_are_weighted_within_each_token(num_gaussians, combine, causal, agree):
    layer, x = make(FeatureGAAM, causal, num_heads=2, num_gaussians=num_gaussians, combine=combine)
    agree(lambda: layer(x), lambda: along_channels(layer, x), [x, *layer.parameters()])


def test_weights_sum_to_one_over_each_piece():
    layer, x = make(num_heads=2)
    first, rest = layer.weights(x).split([3, 4], dim=1)
    torch.testing.assert_close(torch.stack([first.sum(1), rest.sum(1)]), torch.ones(2, B, M).double())
    layer, x = make(FeatureGAAM, num_heads=2)
    first, rest = layer.weights(x).split([2, 3], dim=2)
    torch.testing.assert_close(torch.stack([first.sum(2), rest.sum(2)]), torch.ones(2, B, T).double())


def test_wide_gaussians_weigh_all_alike():
    layer, x = make(num_heads=2)
    with torch.no_grad():
        layer.gaussians.log_scale.fill_(20.0)
    sizes = torch.tensor([3.0] * 3 + [4.0] * 4).double()[:, None]
    torch.testing.assert_close(layer(x), x / sizes)


def test_a_product_of_two_gaussians_is_one_with_the_summed_precision():
    (two, x), (one, _) = make(num_gaussians=2), make(num_gaussians=1)
    precision = (-2 * two.gaussians.log_scale.detach()).exp()  # 1 / c^2
    with torch.no_grad():
        one.gaussians.log_scale.fill_(-precision.sum().log() / 2)
        one.gaussians.offset.fill_((precision * two.gaussians.offset).sum() / precision.sum())
    torch.testing.assert_close(one(x), two(x))
    two.gaussians.combine = "sum"
    assert (one(x) - two(x)).abs().max() > 1e-3


def test_the_last_running_statistics_are_those_of_the_whole():
    layer, x = make(causal=True)
    _, state = layer.prefill(x)
    mean = state.total / T
    torch.testing.assert_close(mean, x.mean(1))
    torch.testing.assert_close((state.squares - state.total * mean) / (T - 1), x.var(1))
    assert state.total.numel() * 3 * 4 == B * layer.state_bytes(T)


def test_it_starts_as_the_authors_code_and_has_2_k_numbers_per_head():
    layer = GAAM(LayerSpec(dim=M, num_heads=1, causal=False), num_heads=3, num_gaussians=5)
    assert layer.gaussians.offset.eq(0).all()
    assert sum(p.numel() for p in layer.parameters()) == 2 * 5 * 3


@pytest.mark.parametrize(
    ("kind", "keywords", "message"),
    [
        (GAAM, {"causal": True, "num_heads": 2}, "num_heads must be 1, got 2"),
        (GAAM, {"num_heads": 0}, "num_heads must be at least 1, got 0"),
        (GAAM, {"num_gaussians": 0}, "num_gaussians must be at least 1, got 0"),
        (GAAM, {"combine": "mean"}, "combine must be one of product, sum, got 'mean'"),
        (FeatureGAAM, {"num_heads": 6}, "num_heads must be at most dim, got num_heads=6 and dim=5"),
    ],
)
def test_bad_values_are_refused(kind, keywords, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **keywords)
