"""DeltaNet and Gated DeltaNet against the recurrences of Yang et al. 2024 and 2024b, convolution included."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.linear.delta_net import DeltaNet
from attentions.linear.gated_delta_net import GatedDeltaNet

B, T, M, H = 2, 37, 84, 6


def convolved(conv, raw, order):
    """SiLU of the convolution over [T, C] in the direction of `order`: a position and the three before it."""
    rows = {}
    for i, t in enumerate(order):
        mixed = sum(conv.weight[:, 3 - j] * raw[order[i - j]] for j in range(min(i, 3) + 1))
        rows[t] = mixed * mixed.sigmoid()
    return rows


def unit(vectors, width, index):
    vector = vectors[index * width : (index + 1) * width]
    return vector / (vector.square().sum() + 1e-6).sqrt()


def memories(layer, source, visible, order):
    """S after each position of `order`, per head: S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""
    key_dim, value_dim, groups = layer.key_dim, layer.value_dim, layer.spec.kv_heads
    raw = source @ torch.cat([layer.k_proj.weight, layer.v_proj.weight]).T * visible[:, None]
    mixed = convolved(layer.conv, raw, order)
    identity = torch.eye(key_dim, dtype=source.dtype)
    states = [torch.zeros(key_dim, value_dim, dtype=source.dtype) for _ in range(groups)]
    after = {}
    for t in order:
        beta = (layer.beta_proj.weight @ source[t]).sigmoid()
        for g in range(groups) if visible[t] else ():
            k = unit(mixed[t], key_dim, g)
            v = mixed[t][groups * key_dim + g * value_dim : groups * key_dim + (g + 1) * value_dim]
            alpha = torch.ones((), dtype=source.dtype)
            if isinstance(layer, GatedDeltaNet):
                step = torch.log1p(torch.exp(layer.decay_proj.weight[g] @ source[t] + layer.dt_bias[g]))
                alpha = torch.exp(-torch.exp(layer.A_log[g]) * step)
            states[g] = alpha * (identity - beta[g] * torch.outer(k, k)) @ states[g] + beta[g] * torch.outer(k, v)
        after[t] = list(states)
    return after


def naive(layer, x, context=None, key_mask=None):
    """o_t = S^T q_t with S after t, from both ends or after the context; masked inputs count as zero."""
    batch = []
    for b in range(B):
        source = x[b] if context is None else context[b]
        visible = torch.ones(len(source)).to(x) if key_mask is None else key_mask[b].to(x)
        orders = [range(len(source))]
        if context is None and not layer.spec.causal:
            orders.append(orders[0][::-1])
        raw = x[b] @ layer.q_proj.weight.T * (visible[:, None] if context is None else 1.0)
        runs = [
            (
                memories(layer, source, visible, order),
                convolved(layer.query_conv, raw, order if context is None else range(x.shape[1])),
            )
            for order in orders
        ]
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                seen, g = t if context is None else len(source) - 1, h * layer.spec.kv_heads // H
                o = sum(memory[seen][g].T @ unit(q[t], layer.key_dim, h) for memory, q in runs) / len(runs)
                heads.append(o / (o.square().mean() + 1e-5).sqrt() * layer.norm.weight)
            out = torch.cat(heads)
            if isinstance(layer, GatedDeltaNet):
                gate = layer.gate_proj.weight @ x[b, t]
                out = out * gate * gate.sigmoid()
            batch.append(layer.out_proj.weight @ out)
    return torch.stack(batch).reshape(x.shape)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("layer_class", [DeltaNet, GatedDeltaNet])
def test_layer_equals_the_paper_s_recurrence(layer_class, num_kv_heads, make_layer, agree):
    layer = make_layer(layer_class, dim=M, num_kv_heads=num_kv_heads)
    layer.chunk_size = 16
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("layer_class", [DeltaNet, GatedDeltaNet])
def test_a_masked_position_neither_writes_nor_decays_nor_reaches_the_convolution(layer_class, make_layer, agree):
    layer = make_layer(layer_class, dim=M)
    x = torch.randn(B, T, M, dtype=torch.float64)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x, *layer.parameters()])


@pytest.mark.parametrize("layer_class", [DeltaNet, GatedDeltaNet])
def test_noncausal_self_attention_averages_the_runs_from_both_ends(layer_class, make_layer, agree):
    layer = make_layer(layer_class, dim=M, causal=False, num_kv_heads=2)
    x = torch.randn(B, 19, M, dtype=torch.float64)
    mask = torch.rand(B, 19, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layer_class", [DeltaNet, GatedDeltaNet])
def test_cross_attention_reads_the_memory_after_the_context(layer_class, causal, make_layer, agree):
    layer = make_layer(layer_class, dim=M, causal=causal, cross=True, num_kv_heads=2)
    x, context = torch.randn(B, 7, M, dtype=torch.float64), torch.randn(B, 19, M, dtype=torch.float64)
    mask = torch.rand(B, 19, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), inputs)


def test_a_full_write_replaces_what_the_key_held(make_layer):
    layer = make_layer(DeltaNet, dim=M)
    key = torch.nn.functional.one_hot(torch.tensor([4, 4, 9]), 14).double()[None, :, None].expand(B, -1, H, -1)
    values = torch.randn(B, 3, H, 14, dtype=torch.float64)
    output = layer.attend(key, key, values, beta=torch.ones(B, 3, H, dtype=torch.float64))
    torch.testing.assert_close(output, values)  # linear attention would add the first two


def test_decays_start_as_published():
    torch.manual_seed(0)
    layer = GatedDeltaNet(LayerSpec(dim=512, num_heads=256, causal=True))
    rate, step = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert 0 < rate.min() < 1 and 15 < rate.max() <= 16
    assert step.min() > 0.00099 and step.max() < 0.101  # float32 through log and expm1
    assert abs(step.log().mean() - math.log(0.01)) < 0.3  # log-uniform: 256 draws of sd 1.33 give a mean within 0.25


@pytest.mark.parametrize(
    ("layer_class", "small"), [(DeltaNet, 64 * 2 + 192 * 4), (GatedDeltaNet, 64 * 4 + 4 + 128 * 4)]
)
def test_it_has_the_parameters_of_softmax_attention_but_for_small_terms(layer_class, small, make_layer):
    layer = make_layer(layer_class, dim=64, num_heads=2)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 64**2 + small + 32
