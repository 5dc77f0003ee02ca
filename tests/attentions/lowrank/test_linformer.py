"""Linformer against loops over positions, rows of the projections and heads."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.lowrank.linformer import Linformer

B, T, S, M, H, RANK = 2, 7, 11, 60, 6, 5


def naive(layer, x, source, causal, key_mask=None):
    """K'[r] = sum_j E[r, j] k_j over the visible j, the same with F for V', and softmax attention over the rows r."""
    width, groups = M // H, layer.spec.kv_heads
    q, k, v = x @ layer.q_proj.weight.T, source @ layer.k_proj.weight.T, source @ layer.v_proj.weight.T
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            stop = i + 1 if causal else source.shape[1]
            seen = [j for j in range(stop) if key_mask is None or key_mask[b, j]]
            heads = []
            for h in range(H):
                g = h * groups // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                e, f = (m[g if m.shape[0] > 1 else 0] for m in (layer.key_map, layer.value_map))
                keys, values = e[:, seen] @ k[b, seen, shared], f[:, seen] @ v[b, seen, shared]
                weights = torch.exp(keys @ q[b, i, own] / math.sqrt(width))
                heads.append(weights @ values / weights.sum())
            rows.append(torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M) @ layer.out_proj.weight.T


def mask_of(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0, 0] = False  # the first causal query sees nothing
    return mask


@pytest.mark.parametrize(("sharing", "num_kv_heads"), [("headwise", 6), ("none", 6), ("none", 2), ("key_value", 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_softmax_over_mixed_keys(causal, sharing, num_kv_heads, make_layer, agree):
    layer = make_layer(Linformer, rank=RANK, sharing=sharing, causal=causal, num_kv_heads=num_kv_heads)
    x = torch.randn(B, T, M, dtype=torch.float64)
    for mask in (None, mask_of(T)):
        parameters = [x, *layer.parameters()]
        agree(lambda m=mask: layer(x, key_mask=m), lambda m=mask: naive(layer, x, x, causal, m), parameters)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_mixes_the_whole_context(causal, make_layer, agree):
    layer = make_layer(Linformer, rank=RANK, causal=causal, cross=True)
    x, context = torch.randn(B, T, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    mask = mask_of(S)
    agree(
        lambda: layer(x, context, key_mask=mask),
        lambda: naive(layer, x, context, False, mask),
        [x, context, *layer.parameters()],
    )


def test_the_causal_form_does_not_depend_on_its_chunks(make_layer, monkeypatch):
    layer, x = make_layer(Linformer, rank=RANK), torch.randn(B, 37, M, dtype=torch.float64)
    whole = layer(x)
    for size in (1, 4, 10):
        monkeypatch.setattr("attentions.lowrank.linformer.CHUNK", size)
        torch.testing.assert_close(layer(x), whole, rtol=1e-10, atol=1e-11)


def test_every_causal_output_is_that_of_its_prefix(make_layer):
    layer, x = make_layer(Linformer, rank=RANK), torch.randn(B, T, M, dtype=torch.float64)
    whole = make_layer(Linformer, rank=RANK, causal=False)
    for t in range(T):  # the last position of a prefix sees what noncausal attention sees
        torch.testing.assert_close(layer(x)[:, t], whole(x[:, : t + 1])[:, t])


def test_as_many_rows_as_positions_can_be_softmax_attention(make_layer):
    layer, softmax = make_layer(Linformer, rank=S, causal=False), make_layer(Softmax, causal=False)
    with torch.no_grad():
        for weights in (layer.key_map, layer.value_map):
            weights.zero_()[0, :, :S] = torch.eye(S)
    softmax.load_state_dict({name: value for name, value in layer.state_dict().items() if "proj" in name})
    x = torch.randn(B, S, M, dtype=torch.float64)
    torch.testing.assert_close(layer(x), softmax(x))


def test_the_state_holds_two_matrices_whatever_the_length(make_layer):
    layer = make_layer(Linformer, rank=RANK).float()
    for length in (3, 50):
        _, state = layer.prefill(torch.randn(B, length, M))
        assert state.nbytes == B * layer.state_bytes(length) == 2 * B * RANK * M * 4


def test_projections_cover_the_context_and_count_by_sharing():
    spec = LayerSpec(dim=M, num_heads=H, causal=True, cross=True, max_length=100, context_length=41)
    extra = {}
    for sharing in ("key_value", "headwise", "none"):
        layer = Linformer(spec, rank=RANK, sharing=sharing)
        extra[sharing] = sum(parameter.numel() for parameter in layer.parameters()) - 4 * M * M
    assert extra == {"key_value": RANK * 41, "headwise": 2 * RANK * 41, "none": 2 * H * RANK * 41}
    assert layer.key_map.abs().max() <= math.sqrt(3 / (RANK + 41))


def test_mistakes_are_named(make_layer):
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        make_layer(Linformer, rank=0)
    with pytest.raises(ValueError, match="sharing must be one of none, headwise, key_value, got 'layerwise'"):
        make_layer(Linformer, sharing="layerwise")
    layer = Linformer(LayerSpec(dim=M, num_heads=H, causal=True, max_length=20), rank=RANK)
    with pytest.raises(ValueError, match="max_keys=20 positions, got 21"):
        layer(torch.randn(B, 21, M))
