"""Gated linear attention against the recurrence of Yang et al., eq. 3."""

import pytest
import torch

from attentions.linear.gla import GatedLinearAttention

B, T, M, H = 2, 37, 84, 6


def naive(layer, x, key_mask=None):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), then RMS norm, swish gate, projection."""
    key_dim, value_dim = layer.key_dim, layer.value_dim
    batch = []
    for b in range(B):
        states = [torch.zeros(key_dim, value_dim, dtype=x.dtype) for _ in range(H)]
        rows = []
        for t in range(x.shape[1]):
            alpha = (layer.decay_up.weight @ (layer.decay_down.weight @ x[b, t]) + layer.decay_bias).sigmoid() ** (
                1 / 16
            )
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                keys, values = slice(g * key_dim, (g + 1) * key_dim), slice(g * value_dim, (g + 1) * value_dim)
                if key_mask is None or key_mask[b, t]:
                    k, v = layer.k_proj.weight[keys] @ x[b, t], layer.v_proj.weight[values] @ x[b, t]
                    states[h] = alpha[keys, None] * states[h] + torch.outer(k, v)
                q = layer.q_proj.weight[h * key_dim : (h + 1) * key_dim] @ x[b, t]
                o = states[h].T @ q / key_dim**0.5
                heads.append(o / (o.square().mean() + 1e-5).sqrt() * layer.norm.weight)
            gate = layer.gate_proj.weight @ x[b, t]
            rows.append(layer.out_proj.weight @ (torch.cat(heads) * gate * gate.sigmoid()))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_layer_equals_the_paper_s_recurrence(num_kv_heads, make_layer, agree):
    layer = make_layer(GatedLinearAttention, dim=M, num_kv_heads=num_kv_heads)
    assert (layer.key_dim, layer.value_dim) == (7, 14)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


def test_a_masked_position_neither_writes_nor_decays(make_layer, agree):
    layer = make_layer(GatedLinearAttention, dim=M)
    x = torch.randn(B, T, M, dtype=torch.float64)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, mask), [x, *layer.parameters()])


def test_it_has_the_parameters_of_softmax_attention_but_for_the_low_rank_decay(make_layer):
    layer = make_layer(GatedLinearAttention, dim=64, num_heads=2)
    decay = 64 * 16 + 16 * 32 + 32
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 64**2 + decay + 32
