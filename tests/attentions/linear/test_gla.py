"""Gated linear attention against the recurrence of Yang et al., eq. 3."""

import pytest
import torch

from attentions.linear.gla import GatedLinearAttention

B, T, M, H = 2, 37, 84, 6


def memories(layer, source, b, order, key_mask):
    """S after each position of `order`: S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, a matrix per key-value head."""
    key_dim, value_dim = layer.key_dim, layer.value_dim
    states = [torch.zeros(key_dim, value_dim, dtype=source.dtype) for _ in range(layer.spec.kv_heads)]
    after = {}
    for t in order:
        if key_mask is None or key_mask[b, t]:
            y = source[b, t]
            alpha = (layer.decay_up.weight @ (layer.decay_down.weight @ y) + layer.decay_bias).sigmoid() ** (1 / 16)
            for g in range(layer.spec.kv_heads):
                keys, values = slice(g * key_dim, (g + 1) * key_dim), slice(g * value_dim, (g + 1) * value_dim)
                k, v = layer.k_proj.weight[keys] @ y, layer.v_proj.weight[values] @ y
                states[g] = alpha[keys, None] * states[g] + torch.outer(k, v)
        after[t] = list(states)
    return after


def naive(layer, x, context=None, key_mask=None):
    """o_t = S^T q_t / sqrt(K) with S after t, from both ends or after the context; RMS norm, swish gate, projection."""
    source = x if context is None else context
    orders = [range(source.shape[1])]
    if context is None and not layer.spec.causal:
        orders.append(orders[0][::-1])
    rows = []
    for b in range(B):
        runs = [memories(layer, source, b, order, key_mask) for order in orders]
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                q = layer.q_proj.weight[h * layer.key_dim : (h + 1) * layer.key_dim] @ x[b, t]
                g = h * layer.spec.kv_heads // H
                seen = t if context is None else source.shape[1] - 1
                o = sum(run[seen][g].T @ q for run in runs) / len(runs) / layer.key_dim**0.5
                heads.append(o / (o.square().mean() + 1e-5).sqrt() * layer.norm.weight)
            gate = layer.gate_proj.weight @ x[b, t]
            rows.append(layer.out_proj.weight @ (torch.cat(heads) * gate * gate.sigmoid()))
    return torch.stack(rows).reshape(x.shape)


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
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x, *layer.parameters()])


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_noncausal_self_attention_averages_the_runs_from_both_ends(num_kv_heads, make_layer, agree):
    layer = make_layer(GatedLinearAttention, dim=M, causal=False, num_kv_heads=num_kv_heads)
    x = torch.randn(B, 19, M, dtype=torch.float64)
    mask = torch.rand(B, 19, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_the_memory_after_the_context(causal, make_layer, agree):
    layer = make_layer(GatedLinearAttention, dim=M, causal=causal, cross=True, num_kv_heads=2)
    x, context = torch.randn(B, 5, M, dtype=torch.float64), torch.randn(B, 19, M, dtype=torch.float64)
    mask = torch.rand(B, 19, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), inputs)


def test_it_has_the_parameters_of_softmax_attention_but_for_the_low_rank_decay(make_layer):
    layer = make_layer(GatedLinearAttention, dim=64, num_heads=2)
    decay = 64 * 16 + 16 * 32 + 32
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 64**2 + decay + 32
