"""Mamba-2 against the state space recurrence of Dao & Gu, convolution, skip and gated norm included."""

import math

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec
from attentions.linear.mamba2 import Mamba2

B, M, N = 2, 42, 5  # 6 heads of width 14, unless said otherwise


def convolved(conv, raw, order):
    """SiLU of bias and convolution over [T, C] in the direction of `order`."""
    rows = {}
    for i, t in enumerate(order):
        mixed = conv.bias + sum(conv.weight[:, 3 - j] * raw[order[i - j]] for j in range(min(i, 3) + 1))
        rows[t] = mixed * mixed.sigmoid()
    return rows


def states(layer, source, visible, order):
    """h after each position of `order`, per head [N, P], and its x: h_t = exp(-exp(A) dt) h_{t-1} + dt B x^T."""
    width, inner = layer.head_dim, layer.inner
    written = source @ layer.write_proj.weight.T * visible[:, None]
    mixed = convolved(layer.conv, written[:, : inner + layer.num_groups * N], order)
    h = [torch.zeros(N, width, dtype=source.dtype) for _ in range(layer.num_heads)]
    after = {}
    for t in order:
        values = []
        for head in range(layer.num_heads):
            x = mixed[t][head * width : (head + 1) * width]
            group = head * layer.num_groups // layer.num_heads
            b = mixed[t][inner + group * N : inner + (group + 1) * N]
            dt = torch.log1p(torch.exp(written[t, inner + layer.num_groups * N + head] + layer.dt_bias[head]))
            if visible[t]:
                h[head] = torch.exp(-torch.exp(layer.A_log[head]) * dt) * h[head] + dt * torch.outer(b, x)
            values.append(x)
        after[t] = list(h), values
    return after


def naive(layer, x, context=None, key_mask=None):
    """y = C h + D x, from both ends or after the context; then W RMSNorm(y * silu(z)), normed group by group."""
    rows = []
    for b in range(B):
        source = x[b] if context is None else context[b]
        visible = torch.ones(len(source)).to(x) if key_mask is None else key_mask[b].to(x)
        orders = [range(len(source))]
        if context is None and not layer.spec.causal:
            orders.append(orders[0][::-1])
        seen = x[b] * visible[:, None] if context is None else x[b]
        z, raw = (seen @ layer.read_proj.weight.T).split([layer.inner, layer.num_groups * N], dim=-1)
        runs = [
            (
                states(layer, source, visible, order),
                convolved(layer.query_conv, raw, range(len(seen)) if layer.spec.cross else order),
            )
            for order in orders
        ]
        for t in range(len(seen)):
            heads = []
            for head in range(layer.num_heads):
                y = 0
                for after, mixed in runs:
                    h, values = after[len(source) - 1 if layer.spec.cross else t]
                    group = head * layer.num_groups // layer.num_heads
                    y = y + mixed[t][group * N : (group + 1) * N] @ h[head] / len(runs)
                    if not layer.spec.cross:
                        y = y + layer.D[head] * values[head] / len(runs)
                heads.append(y)
            gated = torch.cat(heads) * z[t] * z[t].sigmoid()
            normed = [part / (part.square().mean() + 1e-5).sqrt() for part in gated.chunk(layer.num_groups)]
            rows.append(layer.out_proj.weight @ (torch.cat(normed) * layer.norm_weight))
    return torch.stack(rows).reshape(x.shape)


def stream(length, seed=2):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(length):
    return torch.rand(B, length, generator=torch.Generator().manual_seed(1)) > 0.3


@pytest.fixture
def make(make_layer):
    return lambda **keywords: make_layer(Mamba2, **{"dim": M, "state_dim": N, "head_dim": None, **keywords})


@pytest.mark.parametrize(("num_groups", "head_dim"), [(1, None), (2, None), (3, 7)])
def test_layer_equals_the_paper_s_recurrence(num_groups, head_dim, make, agree):
    layer, x = make(num_groups=num_groups, head_dim=head_dim), stream(19)
    assert layer.num_heads == (6 if head_dim is None else 12)
    layer.chunk_size = 8
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_a_masked_position_neither_writes_nor_decays_nor_reaches_the_convolution(causal, make, agree):
    layer, x, mask = make(causal=causal), stream(19), visible(19)
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x, *layer.parameters()])


def test_noncausal_self_attention_averages_the_runs_from_both_ends(make, agree):
    layer, x = make(causal=False, num_groups=2), stream(17)
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_the_state_after_the_context(causal, make, agree):
    layer, x, context, mask = make(causal=causal, cross=True, num_groups=2), stream(7), stream(19, 3), visible(19)
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), inputs)


def test_padding_on_the_left_changes_nothing(make):
    layer, x, mask = make(), stream(37), torch.arange(37).expand(B, -1) >= 9
    torch.testing.assert_close(layer(x, key_mask=mask)[:, 9:], layer(x[:, 9:]), rtol=1e-9, atol=1e-10)


def test_it_starts_as_published():
    torch.manual_seed(0)
    layer = Mamba2(LayerSpec(dim=2048, num_heads=1, causal=True))
    rate, step = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert layer.num_heads == 64 and layer.state_dim == 128
    assert 1 <= rate.min() < 2 and 15 < rate.max() <= 16
    assert step.min() > 0.00099 and step.max() < 0.101 and abs(step.log().mean() - math.log(0.01)) < 0.5
    assert layer.D.eq(1).all()


def test_it_has_six_m_squared_and_small_terms():
    layer = Mamba2(LayerSpec(dim=64, num_heads=2, causal=True), state_dim=16, head_dim=None)
    small = 64 * (2 * 16 + 2) + (128 + 2 * 16) * (4 + 1) + 3 * 2 + 128  # B, C, dt; convolutions; A, b, D; norm
    assert sum(parameter.numel() for parameter in layer.parameters()) == 6 * 64**2 + small


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"head_dim": 13}, "head_dim must divide expand \\* dim = 84, got 13; nearest: 12"),
        ({"num_groups": 4}, "num_groups must divide the 6 heads, got 4; nearest: 3"),
        ({"num_groups": 0}, "num_groups must divide the 6 heads, got 0; nearest: 1"),
        ({"state_dim": 0}, "state_dim must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused_with_the_way_out(keywords, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(LayerSpec(dim=42, num_heads=6, causal=True), **{"head_dim": None, **keywords})
