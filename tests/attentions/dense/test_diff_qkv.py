"""DiffQKV attention as loops over rows, heads and positions, each query head with a key and a value head of its own."""

import math

import pytest
import torch

from attentions.base import LayerSpec, rotary
from attentions.dense.diff_qkv import DiffQKV
from attentions.dense.grouped_query import GroupedQuery
from attentions.dense.softmax import Softmax

B, T, S, M, H, D = 2, 7, 5, 36, 6, 6
CASES = {  # n_k, n_v of 6
    "fewer keys": ({"key_heads": 0.34}, 2, 6),
    "numbers that do not divide each other": ({"key_heads": 0.34, "value_heads": 0.5}, 2, 3),
    "narrow keys": ({"key_heads": 0.5, "value_heads": 0.5, "key_width": 0.5}, 3, 3),
    "augmented queries": ({"key_heads": 0.2, "value_heads": 0.5, "augq_ratio": 1.5}, 1, 3),
    "all of it": ({"key_heads": 0.5, "key_width": 0.5, "augq_ratio": 0.5}, 3, 6),
}


def naive(layer, x, source, causal, key_mask):
    base, keys, values = layer.spec.rotary_base, layer.num_key_heads, layer.num_value_heads
    width = layer.stored_dim

    def turned(vector, position):
        if base is None or layer.spec.cross:
            return vector
        return rotary(vector[None, None, None], base=base, start=position)[0, 0, 0]

    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            queries = layer.q_proj.weight @ x[b, i]
            if not isinstance(layer.augment, torch.nn.Identity):  # appendix E: the projected query is gated
                gate = layer.augment.gate.weight @ queries
                queries = layer.augment.down.weight @ (
                    gate / (1 + torch.exp(-gate)) * (layer.augment.up.weight @ queries)
                )
            heads = []
            for h in range(H):
                c, g = h * keys // H, h * values // H
                q = turned(queries[h * D : (h + 1) * D], i)
                head, norm = torch.zeros(D, dtype=x.dtype), 0.0
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask is None or key_mask[b, j]:
                        k = layer.k_proj.weight[c * width : (c + 1) * width] @ source[b, j]
                        k = turned(k if width == D else layer.lift.weight @ k, j)
                        weight = torch.exp(q @ k / math.sqrt(D))
                        head = head + weight * (layer.v_proj.weight[g * D : (g + 1) * D] @ source[b, j])
                        norm = norm + weight
                heads.append(head / norm if isinstance(norm, torch.Tensor) else head)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize("rotary_base", [None, 100.0])
@pytest.mark.parametrize("case", CASES)
def test_each_query_head_reads_its_own_share_of_keys_and_values(case, rotary_base, make_layer, agree):
    keywords, keys, values = CASES[case]
    layer = make_layer(DiffQKV, dim=M, num_heads=H, rotary_base=rotary_base, **keywords)
    assert (layer.num_key_heads, layer.num_value_heads) == (keys, values)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True, None), [x, *layer.parameters()])


@pytest.mark.parametrize(("causal", "cross"), [(False, False), (False, True), (True, True)])
def test_the_other_patterns_see_all_unmasked_keys(causal, cross, make_layer, agree):
    layer = make_layer(
        DiffQKV, dim=M, num_heads=H, causal=causal, cross=cross, rotary_base=100.0, **CASES["all of it"][0]
    )
    x = torch.randn(B, S, M, dtype=torch.float64)
    source = torch.randn(B, T, M, dtype=torch.float64) if cross else x
    mask = torch.rand(B, source.shape[1], generator=torch.Generator().manual_seed(3)) > 0.3
    inputs = [x, *([source] if cross else []), *layer.parameters()]
    context = source if cross else None
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, source, False, mask), inputs)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_with_nothing_changed_it_is_softmax_attention(num_kv_heads, make_layer):
    layer = make_layer(DiffQKV, dim=M, num_heads=H, num_kv_heads=num_kv_heads, key_heads=1.0)
    softmax = make_layer(Softmax, dim=M, num_heads=H, num_kv_heads=num_kv_heads)
    softmax.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, M, dtype=torch.float64)
    torch.testing.assert_close(layer(x), softmax(x))


def test_equally_fewer_keys_and_values_are_grouped_queries(make_layer):
    layer = make_layer(DiffQKV, dim=M, num_heads=H, key_heads=0.5, value_heads=0.5)
    grouped = make_layer(GroupedQuery, dim=M, num_heads=H, queries_per_kv=2)
    grouped.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, M, dtype=torch.float64)
    torch.testing.assert_close(layer(x), grouped(x))
    assert layer.state_bytes(T) == grouped.state_bytes(T)


def test_the_published_heads_save_three_eighths_of_the_state_of_sixteen_groups():
    spec = LayerSpec(dim=2048, num_heads=32, causal=True, num_kv_heads=16)
    with torch.device("meta"):
        layer = DiffQKV(spec, key_heads=0.25, augq_ratio=1.5)
    assert (layer.num_key_heads, layer.num_value_heads, layer.augment.down.in_features) == (4, 16, 3072)
    assert layer.state_bytes(1) == 4 * 1280
    assert layer.state_bytes(1) / Softmax(spec).state_bytes(1) == 1 - 0.375


def test_augmented_queries_cost_what_a_gated_feed_forward_layer_as_wide_does():
    dim = 4096
    spec = LayerSpec(dim=dim, num_heads=32, causal=True, num_kv_heads=16)
    with torch.device("meta"):
        plain, augmented = (
            sum(p.numel() for p in DiffQKV(spec, key_heads=0.25, augq_ratio=ratio).parameters())
            for ratio in (None, 1.5)
        )
    assert augmented - plain == 3 * dim * 6144  # table 4 compares the two at equal parameters
    model = 32 * (augmented + 3 * dim * 14336) + 128_256 * dim  # Sigma-10B of table 14, one table of embeddings
    assert model == pytest.approx(10e9, rel=0.01)


def test_narrow_keys_are_cached_narrow(make_layer):
    layer = make_layer(DiffQKV, dim=M, num_heads=H, key_heads=0.5, key_width=0.5, rotary_base=100.0).float()
    state = layer.prefill(torch.randn(1, T, M))[1]
    assert state.k.shape == (1, T, 3, 3)
    assert state.v.shape == (1, T, 6, 6)


def test_the_parameters_are_those_of_its_parts(make_layer):
    layer = make_layer(DiffQKV, dim=M, num_heads=H, key_heads=0.5, key_width=0.5, augq_ratio=1.5)
    expected = M * (3 * 3 + 6 * D + 2 * M) + 3 * D + 3 * 54 * M
    assert sum(p.numel() for p in layer.parameters()) == expected


@pytest.mark.parametrize(("fraction", "number"), [(0.01, 1), (0.25, 3), (0.3, 3), (0.4, 4), (0.99, 6), (1.0, 12)])
def test_a_fraction_keeps_the_largest_divisor_below_it(fraction, number):
    assert DiffQKV(LayerSpec(dim=24, num_heads=12, causal=True), key_heads=fraction).num_key_heads == number


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"key_heads": 0.0}, "key_heads must be above 0 and at most 1, got 0.0; nearest: 1"),
        ({"value_heads": 2.0}, "value_heads must be above 0 and at most 1, got 2.0"),
        ({"key_width": -1.0}, "key_width must be above 0"),
        ({"augq_ratio": 0.0}, "augq_ratio must be above 0 or null, got 0.0; nearest: 0.028"),
    ],
)
def test_settings_without_a_meaning_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        DiffQKV(LayerSpec(dim=M, num_heads=H, causal=True), **{"key_heads": 0.5, **keywords})
