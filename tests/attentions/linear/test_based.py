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
def test_packed_and_full_features_are_the_taylor_features(feature_dim, make_layer):
    packed, full = (make_layer(Based, feature_dim=feature_dim, features=form) for form in ("packed", "full"))
    q, k = torch.randn(2, 11, feature_dim, dtype=torch.float64)

    def taylor(x):  # 1, x, vec(x x^T) / sqrt(2), each at its power of f
        square = torch.einsum("ti,tj->tij", x, x).flatten(1) / math.sqrt(2 * feature_dim)
        return torch.cat([torch.ones(11, 1, dtype=x.dtype), x / feature_dim**0.25, square], dim=-1)

    want = taylor(q) @ taylor(k).T
    torch.testing.assert_close(full.features(q), taylor(q), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed.features(q) @ packed.features(k).T, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed.score(q @ k.T), want, rtol=1e-12, atol=1e-12)
    assert want.min() >= 0.5, "the series has no zero, so its sum needs no eps"
    widths = [layer.features(q).shape[-1] for layer in (packed, full)]
    assert widths == [1 + feature_dim + feature_dim * (feature_dim + 1) // 2, 1 + feature_dim + feature_dim**2]


@pytest.mark.parametrize(("causal", "cross"), [(True, False), (False, False), (True, True), (False, True)])
def test_packed_and_full_features_give_one_layer(causal, cross, make_layer, agree):
    packed, full = (
        make_layer(Based, feature_dim=5, features=form, causal=causal, cross=cross, num_kv_heads=2)
        for form in ("packed", "full")
    )
    for layer in (packed, full):
        layer.chunk_size = 4
    x, *context = torch.randn(1 + cross, B, 13, M, dtype=torch.float64)
    agree(lambda: full(x, *context), lambda: packed(x, *context), [x, *context])
    prompts = [layer.prefill(x[:, :9], *context)[1] for layer in (packed, full)]
    steps = [layer.step(x[:, 9:10], state)[0] for layer, state in zip((packed, full), prompts, strict=True)]
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-9)


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


def test_the_error_against_softmax_falls_with_the_third_power_of_the_scores(make_layer):
    layer = make_layer(Based, feature_dim=5)
    q, k = torch.randn(2, B, 37, H, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = torch.randn(B, 37, H, 10, dtype=torch.float64)

    def error(scale):
        small, keys, values = (x.transpose(1, 2) for x in (scale * q, k, v))
        want = F.scaled_dot_product_attention(small, keys, values, is_causal=True).transpose(1, 2)
        return float((layer.attend(scale * q, k, v) - want).abs().max())

    # |s| < 0.1: the series errs by s^3 / 6, and half the scores leave an eighth of that
    assert error(0.02) < 1e-4
    assert error(0.02) / error(0.01) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize(("features", "width"), [("packed", 153), ("full", 273)])
def test_the_state_is_the_features_times_values_and_normaliser(features, width, make_layer):
    layer = make_layer(Based, features=features).float()
    assert layer.init_state(B).nbytes == B * layer.state_bytes(37) == B * H * width * (10 + 1) * 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(features="symmetric"), "features must be one of packed, full, got symmetric"),
        (dict(feature_dim=0), "feature_dim must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_with_the_valid_ones(setting, message, make_layer):
    with pytest.raises(ValueError, match=message):
        make_layer(Based, **setting)
