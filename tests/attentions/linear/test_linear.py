"""Linear attention against Katharopoulos et al., eqs. 4 and 7, as double loops."""

import pytest
import torch
import torch.nn.functional as F

from attentions.linear.linear import Linear

B, T, M, H = 2, 37, 60, 6


def naive(layer, x, source, causal, key_mask=None):
    """o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j) over the visible j."""
    width = M // H
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                rows_q = slice(h * width, (h + 1) * width)
                g = h * layer.spec.kv_heads // H
                rows_k = slice(g * width, (g + 1) * width)
                phi_q = F.elu(layer.q_proj.weight[rows_q] @ x[b, i]) + 1
                total, norm = torch.zeros(width, dtype=x.dtype), torch.zeros((), dtype=x.dtype)
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask is not None and not key_mask[b, j]:
                        continue
                    weight = phi_q @ (F.elu(layer.k_proj.weight[rows_k] @ source[b, j]) + 1)
                    total = total + weight * (layer.v_proj.weight[rows_k] @ source[b, j])
                    norm = norm + weight
                heads.append(total / norm)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("length", [5, 13])
def test_causal_self_attention_equals_the_running_sums(length, num_kv_heads, make_layer, agree):
    layer = make_layer(Linear, num_kv_heads=num_kv_heads)
    layer.chunk_size = 4
    x = torch.randn(B, length, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, causal=True), [x, *layer.parameters()])


def test_noncausal_self_attention_reads_every_unmasked_key(make_layer, agree):
    layer = make_layer(Linear, causal=False)
    x = torch.randn(B, 7, M, dtype=torch.float64)
    mask = torch.rand(B, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, False, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_the_whole_context(causal, make_layer, agree):
    layer = make_layer(Linear, causal=causal, cross=True)
    x, context = torch.randn(B, 5, M, dtype=torch.float64), torch.randn(B, 11, M, dtype=torch.float64)
    mask = torch.rand(B, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(
        lambda: layer(x, context, key_mask=mask),
        lambda: naive(layer, x, context, False, mask),
        [x, context, *layer.parameters()],
    )


def test_features_stay_positive_where_elu_plus_one_rounds_to_zero(make_layer):
    layer = make_layer(Linear)
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0])
    torch.testing.assert_close(layer.features(x), torch.tensor([9.3576e-14, 0.3678794, 1.0, 3.0]))


def test_a_query_without_any_key_reads_zero(make_layer):
    layer = make_layer(Linear, causal=False)
    x = torch.randn(B, T, M, dtype=torch.float64)
    assert layer(x, key_mask=torch.zeros(B, T, dtype=torch.bool)).eq(0).all()
