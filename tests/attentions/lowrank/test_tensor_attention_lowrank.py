"""Low-rank tensor attention against the polynomial written on the scores of triples, and against the exact form."""

import itertools
import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.tensor_attention import TensorAttention
from attentions.lowrank.tensor_attention_lowrank import TensorAttentionLowRank

B, T, S, M, H, K, V = 2, 7, 5, 21, 3, 4, 7


def naive(layer, x, source, causal, key_mask=None):
    """o_i = sum_jk p_g(s_ijk) (v1_j * v2_k) / sum_jk p_g(s_ijk), entries over their root mean square."""

    def unit(projection, h, vectors):
        heads = vectors @ projection.weight[h * K : (h + 1) * K].T
        return layer.bound * heads / torch.sqrt((heads * heads).mean(-1, keepdim=True) + 1e-6)

    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            keys = [j for j in range(i + 1 if causal else source.shape[1]) if key_mask is None or key_mask[b, j]]
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own = slice(g * V, (g + 1) * V)
                q = unit(layer.q_proj, h, x[b, i : i + 1])[0]
                k1, k2 = unit(layer.k_proj, g, source[b, keys]), unit(layer.k2_proj, g, source[b, keys])
                s = torch.einsum("c,jc,kc->jk", q, k1, k2) / K
                weights = sum(s**n / math.factorial(n) for n in range(layer.degree + 1))
                v1, v2 = source[b, keys] @ layer.v_proj.weight[own].T, source[b, keys] @ layer.v2_proj.weight[own].T
                heads.append(torch.einsum("jk,je,ke->e", weights, v1, v2) / (weights.sum() if keys else 1))
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


def make(make_layer, **keywords):
    return make_layer(TensorAttentionLowRank, dim=M, num_heads=H, key_dim=K, **keywords)


@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize(("causal", "degree", "bound"), [(True, 2, 1.0), (True, 4, 1.3), (False, 2, 0.7)])
def test_self_attention_equals_the_polynomial_on_triples(causal, degree, bound, num_kv_heads, make_layer, agree):
    layer = make(make_layer, causal=causal, degree=degree, bound=bound, num_kv_heads=num_kv_heads)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, causal), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_no_pair_with_a_masked_key_is_read(causal, make_layer, agree):
    layer, x = make(make_layer, causal=causal), torch.randn(B, S, M, dtype=torch.float64)
    mask = torch.tensor([[False, False, True, True, False], [True, True, False, True, True]])
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, causal, mask), inputs)
    if causal:
        assert layer(x, key_mask=mask)[0, :2].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_all_pairs_of_the_context(causal, make_layer, agree):
    layer = make(make_layer, causal=causal, cross=True)
    x, context = torch.randn(B, 3, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, False), inputs)


@pytest.mark.parametrize(("key_dim", "degree"), [(1, 2), (2, 6), (4, 2), (5, 4)])
def test_monomials_with_their_coefficients_give_the_series_of_exp(key_dim, degree):
    spec = LayerSpec(dim=6, num_heads=3, causal=True)
    layer = TensorAttentionLowRank(spec, key_dim=key_dim, degree=degree, bound=1.0).double()
    rank = math.comb(key_dim + degree, degree)
    assert len(layer.coefficients) == layer.monomials(torch.randn(key_dim)).shape[-1] == rank
    q, k1, k2 = torch.randn(3, 11, key_dim, dtype=torch.float64)
    s = torch.stack([x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k1, k2)]).prod(0).mean(-1)
    series = sum(s**n / math.factorial(n) for n in range(degree + 1))
    powers = torch.stack([layer.monomials(x) for x in (q, k1, k2)]).prod(0)
    torch.testing.assert_close(
        powers @ torch.tensor(layer.coefficients, dtype=torch.float64), series, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_against_exact_tensor_attention_falls_with_the_degree(causal, make_layer):
    exact = make_layer(TensorAttention, dim=K * H, num_heads=H, causal=causal)
    q, k1, k2, v1, v2 = torch.randn(5, B, T, H, K, dtype=torch.float64)
    errors = []
    for degree in (2, 4, 6, 8):
        layer = make_layer(
            TensorAttentionLowRank, dim=K * H, num_heads=H, causal=causal, key_dim=K, degree=degree, bound=1.0
        )
        unit_q, unit_k1, unit_k2 = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k1, k2))
        expected = exact.attend(unit_q, unit_k1, v1, k2=unit_k2, v2=v2)
        errors.append(float((layer.attend(q, k1, v1, k2=k2, v2=v2) - expected).abs().max()))
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)) and errors[-1] < 1e-3


def test_weights_stay_positive_where_an_odd_series_would_not(make_layer):
    """At s = -2, the least that four channels allow: 1 - 2 + 2 = 1, where degree 3 gives -1/3."""
    layer = make(make_layer, bound=1.0)
    one = torch.tensor([2.0, 0, 0, 0]).expand(1, 1, H, K).double()
    s = [layer.monomials(x) * layer.monomials(one) for x in (one, -one)]
    c = torch.tensor(layer.coefficients, dtype=torch.float64)
    for x, value in zip(s, (1 + 2 + 2, 1 - 2 + 2), strict=True):
        torch.testing.assert_close(
            x * layer.monomials(one) @ c, torch.full((1, 1, H), value).double(), rtol=1e-5, atol=0
        )


def test_the_state_is_two_sums_whatever_the_length(make_layer):
    layer = make(make_layer).float()
    for length in (3, 13):
        assert layer.prefill(torch.randn(B, length, M))[1].nbytes == B * H * 2 * 15 * (V + 1) * 4


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"degree": 3}, "degree must be even, or weights may be negative, got 3; nearest: 2, 4"),
        ({"degree": 1}, "got 1; nearest: 2$"),
        ({"degree": 0}, "degree must be at least 1, got 0"),
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
    ],
)
def test_bad_values_are_refused(keywords, message, make_layer):
    with pytest.raises(ValueError, match=message):
        make_layer(TensorAttentionLowRank, **keywords)
