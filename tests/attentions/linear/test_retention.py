"""Retention against the recurrence of Sun et al., eq. 6, with complex rotation and the layer of eq. 8."""

import pytest
import torch

from attentions.linear.retention import Retention

B, T, M, H = 2, 37, 84, 6


def rotated(vector, n):
    """Channels j and j + K / 2 are one complex number, turned by n theta_j."""
    half = len(vector) // 2
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half), n * theta)
    return torch.cat([turned.real, turned.imag])


def memories(layer, source, b, order, key_mask, origin):
    """S after each position n of `order`, per head: S_n = gamma S_{n-1} + k_n^T v_n, `origin` is position 0."""
    key_dim, value_dim = layer.key_dim, layer.value_dim
    states = [torch.zeros(key_dim, value_dim, dtype=source.dtype) for _ in range(layer.spec.kv_heads)]
    after = {}
    for n in order:
        for g in range(layer.spec.kv_heads):
            states[g] = (1 - 2.0 ** (-5 - g)) * states[g]
            if key_mask is None or key_mask[b, n]:
                k = rotated(layer.k_proj.weight[g * key_dim : (g + 1) * key_dim] @ source[b, n], n - origin)
                v = layer.v_proj.weight[g * value_dim : (g + 1) * value_dim] @ source[b, n]
                states[g] = states[g] + torch.outer(k, v)
        after[n] = list(states)
    return after


def naive(layer, x, context=None, key_mask=None):
    """o_n = q_n S, S after n, from both ends or after the context; then group norm, swish gate, output projection."""
    source = x if context is None else context
    last = source.shape[1] - 1
    orders = [range(last + 1)]
    if context is None and not layer.spec.causal:
        orders.append(orders[0][::-1])
    rows = []
    for b in range(B):
        runs = [memories(layer, source, b, order, key_mask, last if layer.spec.cross else 0) for order in orders]
        for n in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                q = layer.q_proj.weight[h * layer.key_dim : (h + 1) * layer.key_dim] @ x[b, n] / layer.key_dim**0.5
                if context is None:
                    o = sum(rotated(q, n) @ run[n][g] for run in runs) / len(runs)
                else:
                    o = q @ runs[0][last][g]
                heads.append((o - o.mean()) / (o.var(unbiased=False) + 1e-6).sqrt())
            gate = layer.gate_proj.weight @ x[b, n]
            rows.append(layer.out_proj.weight @ (torch.cat(heads) * gate * gate.sigmoid()))
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_layer_equals_the_paper_s_recurrence(num_kv_heads, make_layer, agree):
    layer = make_layer(Retention, dim=M, num_kv_heads=num_kv_heads, expand_v=0.5)
    layer.chunk_size = 16
    x = torch.randn(B, T, M, dtype=torch.float64)
    # rotation angles are float32 by design: 37 radians carry 2e-6
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()], rtol=1e-6, atol=1e-6)


def test_a_masked_position_writes_nothing_while_the_decay_counts_it(make_layer, agree):
    layer = make_layer(Retention, dim=M)
    x = torch.randn(B, T, M, dtype=torch.float64)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, 0] = True
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_noncausal_self_attention_averages_the_runs_from_both_ends(num_kv_heads, make_layer, agree):
    layer = make_layer(Retention, dim=M, causal=False, num_kv_heads=num_kv_heads)
    x = torch.randn(B, 19, M, dtype=torch.float64)
    mask = torch.arange(19).expand(B, -1) % 5 < torch.tensor([[3], [4]])
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_from_the_end_of_the_context(causal, make_layer, agree):
    layer = make_layer(Retention, dim=M, causal=causal, cross=True, num_kv_heads=2)
    x, context = torch.randn(B, 5, M, dtype=torch.float64), torch.randn(B, 19, M, dtype=torch.float64)
    mask = torch.rand(B, 19, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [x, context, *layer.parameters()]
    agree(
        lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), inputs, rtol=1e-6, atol=1e-6
    )


def test_the_backbone_s_rotation_replaces_its_own(make_layer):
    x = torch.randn(B, T, M, dtype=torch.float64)
    own = make_layer(Retention, dim=M)(x)
    torch.testing.assert_close(make_layer(Retention, dim=M, rotary_base=10000.0)(x), own)
    assert not torch.allclose(make_layer(Retention, dim=M, rotary_base=100.0)(x), own)


def test_an_odd_key_width_is_refused_with_the_way_out(make_layer):
    with pytest.raises(ValueError, match="got 15; nearest: 14, 16, or rotary_base=null"):
        make_layer(Retention, dim=90)
