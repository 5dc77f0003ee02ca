"""TransNormerLLM's block: SGLU and SimpleRMSNorm against their formulas, and the stack against a naive one."""

from __future__ import annotations

import math

import pytest
import torch
from hydra.utils import instantiate

from attentions.dense.softmax import Softmax
from attentions.linear.transnormer import TransNormer
from bench.backbones.base import build
from bench.backbones.layers import SGLU, SimpleRMSNorm
from bench.config import compose
from tasks.base import Metric, PerToken, TaskSpec, Tokens

B, T, V, M, H, LAYERS = 2, 11, 23, 12, 3, 3


def spec():
    return TaskSpec(
        inputs=Tokens(vocab_size=V),
        output=PerToken(num_classes=V),
        length=T,
        causal=True,
        metrics={"accuracy": Metric(unit="fraction", higher_is_better=True)},
        primary="accuracy",
        chance=1 / V,
    )


def model(attention, **changes):
    """The preset in small, in float64, with weights of order one."""
    changes = dict(dim=M, num_heads=H, num_layers=LAYERS) | changes
    choice = compose(["backbone=transnormer", *(f"backbone.{key}={value}" for key, value in changes.items())])
    network = build(instantiate(choice.parts["backbone"], _convert_="all"), spec(), attention, seed=0).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return network


def tokens():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


def norm(x):
    """x / (||x|| / sqrt(M)), with 1e-6 beside the mean square."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


def gla(layer, x, index):
    """[Norm(sum_s (q_t.k_s cos theta (t - s)) lambda^(t - s) v_s) * u_t] W_o; theta in the first layer only."""
    width = M // H
    q, k, v, u = (x @ getattr(layer, f"{name}_proj").weight.T for name in ("q", "k", "v", "gate"))
    q, k = silu(q), silu(k)
    slopes = [2**-4, 2**-8, 2**-2]  # ALiBi: those of two heads, then the first of four
    outputs = []
    for h in range(H):
        own = slice(h * width, (h + 1) * width)
        rate = slopes[h] * (1 - index / (LAYERS - 1) + 1e-5)
        for t in range(T):
            total = torch.zeros(B, width, dtype=x.dtype)
            for s in range(t + 1):
                turned = (layer.theta[h] * (t - s)).cos() if index == 0 else torch.ones(width, dtype=x.dtype)
                score = (q[:, t, own] * k[:, s, own] * turned).sum(-1, keepdim=True)
                total = total + math.exp(-rate * (t - s)) * score * v[:, s, own]
            outputs.append(total)
    heads = torch.stack(outputs, dim=1).unflatten(1, (H, T)).transpose(1, 2).flatten(2)
    return (norm(heads) * u) @ layer.out_proj.weight.T


def sglu(mixer, x):
    return ((x @ mixer.value.weight.T) * (x @ mixer.gate.weight.T)) @ mixer.fc2.weight.T


def test_sglu_multiplies_two_projections_without_an_activation():
    torch.manual_seed(0)
    mixer, x = SGLU(M, 2.75).double(), torch.randn(B, T, M, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), sglu(mixer, x))
    torch.testing.assert_close(mixer(3 * x), 9 * mixer(x))  # an activation or a bias would not be quadratic
    assert sum(parameter.numel() for parameter in mixer.parameters()) == 3 * 33 * M


def test_simple_rms_norm_leaves_a_root_mean_square_of_one_and_has_no_weight():
    x = torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = SimpleRMSNorm()
    want = torch.stack([row / (row.norm() / math.sqrt(M)) for row in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)  # the eps is 1e-6 of the mean square
    torch.testing.assert_close(layer(x), norm(x))
    assert not list(layer.parameters()) and layer(torch.zeros(1, M)).eq(0).all()


def test_the_stack_equals_the_paper_s_block():
    network = model(TransNormer)
    x = network.embedding.tokens.weight[tokens()]
    for index, layer in enumerate(network.layers):
        x = x + gla(layer.attention, norm(x), index)
        x = x + sglu(layer.state_mixer, norm(x))
    want = norm(x) @ network.embedding.tokens.weight.T
    got, parameters = network(tokens()), list(network.parameters())
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad((y * direction).sum(), parameters) for y in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", [TransNormer, Softmax])
def test_decoding_token_by_token_equals_the_forward_pass(attention):
    network = model(attention)
    state, outputs = network.init_state(B), []
    for t in range(T):
        logits, state = network.step(tokens()[:, t : t + 1], state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), network(tokens()), rtol=1e-8, atol=1e-8)


def test_the_block_has_the_parameters_that_its_yaml_says():
    """At the preset's width: 5 M^2 against 4, 8.25 M^2 against the 8 of an MLP, and the first layer's angles."""
    mixers = [model(attention, dim=64, num_heads=2, num_layers=2) for attention in (TransNormer, Softmax)]
    size = 64 * 64
    for network, per_layer, angles in zip(mixers, (13.25 * size, 12.25 * size), (64, 0), strict=True):
        embedding = network.embedding.tokens.weight.numel()
        assert network.num_parameters - embedding == 2 * per_layer + angles
