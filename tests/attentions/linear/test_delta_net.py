"""DeltaNet and Gated DeltaNet against the recurrences of Yang et al. 2024 and 2024b, convolution included."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.linear.delta_net import DeltaNet
from attentions.linear.gated_delta_net import GatedDeltaNet

B, T, M, H = 2, 37, 84, 6


def naive(layer, x, key_mask=None):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t; masked inputs count as zero."""
    gated = isinstance(layer, GatedDeltaNet)
    key_dim, value_dim, groups = layer.key_dim, layer.value_dim, layer.spec.kv_heads
    weight = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
    identity = torch.eye(key_dim, dtype=x.dtype)
    batch = []
    for b in range(B):
        raw = [weight @ x[b, t] * (1.0 if key_mask is None else float(key_mask[b, t])) for t in range(x.shape[1])]
        states = [torch.zeros(key_dim, value_dim, dtype=x.dtype) for _ in range(H)]
        rows = []
        for t in range(x.shape[1]):
            mixed = sum(layer.conv.weight[:, 3 - i] * raw[t - i] for i in range(min(t, 3) + 1))
            mixed = mixed * mixed.sigmoid()
            beta = (layer.beta_proj.weight @ x[b, t]).sigmoid()
            heads = []
            for h in range(H):
                g = h * groups // H
                start_k, start_v = H * key_dim, (H + groups) * key_dim
                q = mixed[h * key_dim : (h + 1) * key_dim]
                k = mixed[start_k + g * key_dim : start_k + (g + 1) * key_dim]
                v = mixed[start_v + g * value_dim : start_v + (g + 1) * value_dim]
                q, k = (y / (y.square().sum() + 1e-6).sqrt() for y in (q, k))
                alpha = torch.ones((), dtype=x.dtype)
                if gated:
                    step = torch.log1p(torch.exp(layer.decay_proj.weight[g] @ x[b, t] + layer.dt_bias[g]))
                    alpha = torch.exp(-torch.exp(layer.A_log[g]) * step)
                if key_mask is None or key_mask[b, t]:
                    erase = alpha * (identity - beta[g] * torch.outer(k, k))
                    states[h] = erase @ states[h] + beta[g] * torch.outer(k, v)
                o = states[h].T @ q
                heads.append(o / (o.square().mean() + 1e-5).sqrt() * layer.norm.weight)
            out = torch.cat(heads)
            if gated:
                gate = layer.gate_proj.weight @ x[b, t]
                out = out * gate * gate.sigmoid()
            rows.append(layer.out_proj.weight @ out)
        batch.append(torch.stack(rows))
    return torch.stack(batch)


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
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, mask), [x, *layer.parameters()])


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
