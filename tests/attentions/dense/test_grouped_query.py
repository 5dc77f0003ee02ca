"""Grouped queries against eq. 1 of Vaswani et al. as loops in which the heads of a group share keys and values."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.grouped_query import GroupedQuery, MultiQuery
from attentions.dense.softmax import Softmax

B, T, S, M, H, D = 2, 11, 7, 60, 6, 10


def naive(layer, x, source, causal, key_mask, groups):
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h // (H // groups)
                q = layer.q_proj.weight[h * D : (h + 1) * D] @ x[b, i]
                total, norm = torch.zeros(D, dtype=x.dtype), 0.0
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask[b, j]:
                        k = layer.k_proj.weight[g * D : (g + 1) * D] @ source[b, j]
                        weight = torch.exp(q @ k / math.sqrt(D))
                        total = total + weight * (layer.v_proj.weight[g * D : (g + 1) * D] @ source[b, j])
                        norm = norm + weight
                heads.append(total / norm if isinstance(norm, torch.Tensor) else total)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(
    ("layer_class", "keywords", "groups"), [(MultiQuery, {}, 1), (GroupedQuery, {"queries_per_kv": 3}, 2)]
)
def test_the_heads_of_a_group_share_keys_and_values(layer_class, keywords, groups, cross, causal, make_layer, agree):
    layer = make_layer(layer_class, causal=causal, cross=cross, **keywords)
    x, context = torch.randn(B, T, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    source = (context,) if cross else ()
    mask = torch.rand(B, S if cross else T, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # causal self: the first two queries of row 0 see nothing
    agree(
        lambda: layer(x, *source, key_mask=mask),
        lambda: naive(layer, x, *(source or (x,)), causal and not cross, mask, groups),
        [x, *source, *layer.parameters()],
    )


@pytest.mark.parametrize(
    ("heads", "asked", "groups"),
    [(64, 8, 8), (6, 1, 6), (6, 2, 3), (6, 4, 1), (6, 8, 1), (5, 2, 1), (2, 2, 1), (1, 2, 1)],
)
def test_a_number_that_does_not_divide_rises_to_the_next_divisor(heads, asked, groups):
    spec = LayerSpec(dim=4 * heads, num_heads=heads, num_kv_heads=heads, causal=True)
    assert GroupedQuery(spec, queries_per_kv=asked).spec.kv_heads == groups
    assert MultiQuery(spec).spec.kv_heads == 1


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_parameters_and_state_shrink_with_the_groups(num_kv_heads, make_layer):
    x = torch.randn(1, T, M)
    for layer_class, keywords, groups in ((MultiQuery, {}, 1), (GroupedQuery, {"queries_per_kv": 2}, 3)):
        layer = make_layer(layer_class, num_kv_heads=num_kv_heads, **keywords).float()
        assert sum(p.numel() for p in layer.parameters()) == 2 * M * M + 2 * M * M * groups // H
        assert layer.prefill(x)[1].nbytes == layer.state_bytes(T) == 2 * T * groups * D * 4


def test_one_query_per_key_value_head_is_softmax_attention(make_layer):
    x = torch.randn(B, T, M, dtype=torch.float64)
    options = {"rotary_base": 100.0, "num_kv_heads": 2}
    layer, softmax = make_layer(GroupedQuery, queries_per_kv=1, **options), make_layer(Softmax, rotary_base=100.0)
    softmax.load_state_dict(layer.state_dict())
    assert layer(x).equal(softmax(x))


def test_no_query_per_key_value_head_is_refused(make_layer):
    with pytest.raises(ValueError, match="queries_per_kv must be at least 1, got 0; nearest: 1"):
        make_layer(GroupedQuery, queries_per_kv=0)
