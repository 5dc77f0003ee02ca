"""Based against the Taylor series written on scores, and its packed features against the full outer product."""

import math

import pytest
import torch
import torch.nn.functional as F

from attentions.linear.based import Based

B, M, H = 2, 60, 6


def naive(layer, x, source, causal, key_mask=None):
    """o_i = sum_j w_ij v_j / sum_j w_ij, w = 1 + s + s^2 / 2, s = q.k / sqrt(f), over the visible j."""
    f, width = layer.key_dim, layer.value_dim
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                q = layer.q_proj.weight[h * f : (h + 1) * f] @ x[b, i]
                total, norm = torch.zeros(width, dtype=x.dtype), torch.zeros((), dtype=x.dtype)
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask is not None and not key_mask[b, j]:
                        continue
                    s = q @ (layer.k_proj.weight[g * f : (g + 1) * f] @ source[b, j]) / math.sqrt(f)
                    weight = 1 + s + s * s / 2
                    total = total + weight * (layer.v_proj.weight[g * width : (g + 1) * width] @ source[b, j])
                    norm = norm + weight
                heads.append(total / norm)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize("feature_dim", [1, 2, 7, 16])
def test_packed_features_equal_the_full_taylor_features(feature_dim, make_layer):
    layer = make_layer(Based, feature_dim=feature_dim)
    q, k = torch.randn(2, 11, feature_dim, dtype=torch.float64)

    def full(x):  # 1, x, vec(x x^T) / sqrt(2), each at its power of f
        square = torch.einsum("ti,tj->tij", x, x).flatten(1) / math.sqrt(2 * feature_dim)
        return torch.cat([torch.ones(11, 1, dtype=x.dtype), x / feature_dim**0.25, square], dim=-1)

    packed = layer.features(q) @ layer.features(k).T
    torch.testing.assert_close(packed, full(q) @ full(k).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed, layer.score(q @ k.T), rtol=1e-12, atol=1e-12)
    assert layer.features(q).shape[-1] == 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_causal_self_attention_equals_the_series_on_scores(chunk_size, num_kv_heads, make_layer, agree):
    layer = make_layer(Based, feature_dim=5, num_kv_heads=num_kv_heads)
    layer.chunk_size = chunk_size
    x = torch.randn(B, 13, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, causal=True), [x, *layer.parameters()])


def test_noncausal_self_attention_reads_every_unmasked_key(make_layer, agree):
    layer = make_layer(Based, feature_dim=5, causal=False)
    x = torch.randn(B, 7, M, dtype=torch.float64)
    mask = torch.rand(B, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, False, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_the_whole_context(causal, make_layer, agree):
    layer = make_layer(Based, feature_dim=5, causal=causal, cross=True)
    x, context = torch.randn(B, 5, M, dtype=torch.float64), torch.randn(B, 11, M, dtype=torch.float64)
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, causal=False), [x, context, *layer.parameters()])


def test_small_scores_approach_softmax_attention(make_layer):
    layer = make_layer(Based, feature_dim=5)
    q, k = 0.03 * torch.randn(2, B, 37, H, 5, dtype=torch.float64)
    v = torch.randn(B, 37, H, 10, dtype=torch.float64)
    heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    # |s| < 0.01, and the series errs by s^3 / 6
    torch.testing.assert_close(layer.attend(q, k, v), heads.transpose(1, 2), rtol=0, atol=1e-6)


def test_the_state_is_the_packed_features_times_values_and_normaliser(make_layer):
    state = make_layer(Based).float().init_state(B)
    assert state.nbytes == B * H * 153 * (10 + 1) * 4
