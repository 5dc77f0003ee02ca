"""Retention against the recurrence of Sun et al., eq. 6, with complex rotation and the layer of eq. 8."""

import pytest
import torch

from attentions.linear.retention import Retention

B, T, M, H = 2, 37, 84, 6


def naive(layer, x, key_mask=None):
    """S_n = gamma S_{n-1} + k_n^T v_n, o_n = q_n S_n, then group norm, swish gate and output projection."""
    key_dim, value_dim = layer.key_dim, layer.value_dim
    half = key_dim // 2
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)

    def rotated(vector, n):  # channels j and j + K / 2 are one complex number, turned by n theta_j
        turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half), n * theta)
        return torch.cat([turned.real, turned.imag])

    batch = []
    for b in range(B):
        states = [torch.zeros(key_dim, value_dim, dtype=x.dtype) for _ in range(H)]
        rows = []
        for n in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                q = rotated(layer.q_proj.weight[h * key_dim : (h + 1) * key_dim] @ x[b, n], n) / key_dim**0.5
                states[h] = (1 - 2.0 ** (-5 - g)) * states[h]
                if key_mask is None or key_mask[b, n]:
                    k = rotated(layer.k_proj.weight[g * key_dim : (g + 1) * key_dim] @ x[b, n], n)
                    v = layer.v_proj.weight[g * value_dim : (g + 1) * value_dim] @ x[b, n]
                    states[h] = states[h] + torch.outer(k, v)
                o = q @ states[h]
                heads.append((o - o.mean()) / (o.var(unbiased=False) + 1e-6).sqrt())
            gate = layer.gate_proj.weight @ x[b, n]
            rows.append(layer.out_proj.weight @ (torch.cat(heads) * gate * gate.sigmoid()))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


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
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, mask), [x], rtol=1e-6, atol=1e-6)


def test_the_backbone_s_rotation_replaces_its_own(make_layer):
    x = torch.randn(B, T, M, dtype=torch.float64)
    own = make_layer(Retention, dim=M)(x)
    torch.testing.assert_close(make_layer(Retention, dim=M, rotary_base=10000.0)(x), own)
    assert not torch.allclose(make_layer(Retention, dim=M, rotary_base=100.0)(x), own)


def test_an_odd_key_width_is_refused_with_the_way_out(make_layer):
    with pytest.raises(ValueError, match="got 15; nearest: 14, 16, or rotary_base=null"):
        make_layer(Retention, dim=90)
