"""Tensor attention against its sum over triples, against Kronecker keys, and on a task of triples."""

import math

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec
from attentions.dense import tensor_attention
from attentions.dense.softmax import Softmax
from attentions.dense.tensor_attention import TensorAttention

B, T, S, M, H, D = 2, 7, 5, 15, 3, 5


def naive(layer, x, source, causal, key_mask=None):
    """o_i = sum_jk exp(s_ijk) (v1_j * v2_k) / sum_jk exp(s_ijk) over the visible pairs, s = sum_c q k1 k2 / D."""
    projections = layer.k_proj, layer.k2_proj, layer.v_proj, layer.v2_proj
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            keys = [j for j in range(i + 1 if causal else source.shape[1]) if key_mask is None or key_mask[b, j]]
            heads = []
            for h in range(H):
                own = slice(h * D, (h + 1) * D)
                group = slice((g := h * layer.spec.kv_heads // H) * D, (g + 1) * D)
                q = layer.q_proj.weight[own] @ x[b, i]
                k1, k2, v1, v2 = (source[b, keys] @ p.weight[group].T for p in projections)
                weights = torch.exp(torch.einsum("c,jc,kc->jk", q, k1, k2) / D)
                heads.append(torch.einsum("jk,je,ke->e", weights, v1, v2) / (weights.sum() if keys else 1))
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_the_sum_over_triples(causal, num_kv_heads, make_layer, agree, monkeypatch):
    monkeypatch.setattr(tensor_attention, "SCORES", 2 * T * T)  # tiles of two queries, the last one ragged
    layer = make_layer(TensorAttention, dim=M, num_heads=H, num_kv_heads=num_kv_heads, causal=causal)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, causal), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_no_pair_with_a_masked_key_is_read(causal, make_layer, agree):
    layer, x = make_layer(TensorAttention, dim=M, num_heads=H, causal=causal), torch.randn(B, S, M, dtype=torch.float64)
    mask = torch.tensor([[False, False, True, True, False], [True, True, False, True, True]])
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, causal, mask), inputs)
    if causal:
        assert layer(x, key_mask=mask)[0, :2].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_all_pairs_of_the_context(causal, make_layer, agree):
    layer = make_layer(TensorAttention, dim=M, num_heads=H, causal=causal, cross=True)
    x, context = torch.randn(B, 3, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, False), inputs)


def drawn(*widths, length=T):
    return [torch.randn(B, length, H, width, dtype=torch.float64) for width in widths]


def test_it_is_softmax_attention_over_kronecker_keys_and_values(make_layer):
    layer = make_layer(TensorAttention, dim=M, num_heads=H, causal=False)
    q, (k1, k2), (v1, v2) = drawn(D)[0], drawn(D, D, length=S), drawn(D, D, length=S)
    keys, values = ((a[:, :, None] * b[:, None]).flatten(1, 2) for a, b in ((k1, k2), (v1, v2)))  # [B, S S, H, D]
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, keys, values))
    expected = F.scaled_dot_product_attention(q_, k_, v_, scale=1 / D).transpose(1, 2)
    torch.testing.assert_close(layer.attend(q, k1, v1, k2=k2, v2=v2), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_second_keys_and_values_of_ones_leave_ordinary_attention_at_scale_one_over_d(causal, make_layer):
    layer, softmax = (make_layer(kind, dim=M, num_heads=H, causal=causal) for kind in (TensorAttention, Softmax))
    q, k, v = drawn(D, D, D)
    got = layer.attend(q, k, v, k2=torch.ones_like(k), v2=torch.ones_like(v))
    torch.testing.assert_close(got, softmax.attend(q / math.sqrt(D), k, v))


def test_positions_change_places_without_consequence_and_so_do_the_two_keys(make_layer):
    layer = make_layer(TensorAttention, dim=M, num_heads=H, causal=False)
    (q, k1, k2), (v1, v2) = drawn(D, D, D), drawn(D, D)
    expected, order = layer.attend(q, k1, v1, k2=k2, v2=v2), torch.randperm(T)
    torch.testing.assert_close(layer.attend(q, k2, v2, k2=k1, v2=v1), expected)
    shuffled = [x[:, order] for x in (k1, v1, k2, v2)]
    torch.testing.assert_close(layer.attend(q, *shuffled[:2], k2=shuffled[2], v2=shuffled[3]), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_one_layer_built_by_hand_solves_match_3(causal):
    """Are there j, k (causal: up to i) with x_i + x_j + x_k = 0 mod p? A token is z = exp(2 pi i x / p).

    q, k1 and k2 score Re(z_i z_j z_k) = cos(2 pi (x_i + x_j + x_k) / p) in four channels: 1 for a match, else at most
    cos(2 pi / p). The fifth lets the pair (start, start) score half way between; its weight is the output.
    """
    p, length, sharpness = 11, 8, 200.0
    # columns: cos, sin, is start, one; rows: the product's terms rrr - rii - iri - iir, then start
    query = torch.tensor([[1, 0, 0, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]).double()
    first = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).double()
    second = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]).double()
    layer = TensorAttention(LayerSpec(dim=D, num_heads=1, causal=causal)).double()
    half_way = (1 + math.cos(2 * math.pi / p)) / 2
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.q_proj.weight[:, :4] = D * sharpness * query * torch.tensor([1, 1, 1, 1, half_way])[:, None]
        layer.k_proj.weight[:, :4], layer.k2_proj.weight[:, :4] = first, second
        layer.v_proj.weight[0, 2] = layer.v2_proj.weight[0, 2] = layer.out_proj.weight[0, 0] = 1  # is start
        digits = torch.randint(p, (200, length - 1), generator=torch.Generator().manual_seed(0))
        angle = 2 * math.pi * digits.double() / p
        x = torch.zeros(200, length, D, dtype=torch.float64)
        x[:, 0, 2], x[:, 1:, 0], x[:, 1:, 1], x[..., 3] = 1, angle.cos(), angle.sin(), 1
        found = layer(x)[:, 1:, 0] < 0.5
    hit = (digits[:, :, None, None] + digits[:, None, :, None] + digits[:, None, None, :]) % p == 0
    if causal:
        seen = torch.ones(length - 1, length - 1).tril().bool()
        hit = hit & seen[:, :, None] & seen[:, None, :]
    hit = hit.any((2, 3))
    assert found.equal(hit)
    assert 0.02 < (~hit).double().mean() < 0.98, "both answers occur"


def test_the_cache_holds_both_keys_and_both_values_and_parameters_are_1_5_times_softmax(make_layer):
    layer, softmax = (make_layer(kind, dim=M, num_heads=H).float() for kind in (TensorAttention, Softmax))
    assert layer.prefill(torch.randn(1, T, M))[1].nbytes == 2 * softmax.state_bytes(T)
    count, plain = (sum(p.numel() for p in module.parameters()) for module in (layer, softmax))
    assert count == 1.5 * plain
