"""Differential attention against eqs. 1 to 3 of Ye et al. as loops over rows, heads and positions."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.differential import Differential
from attentions.dense.softmax import Softmax

B, T, S, M, H, D = 2, 7, 5, 36, 3, 12  # halves of 6: three rotary pairs


def naive(layer, x, source, causal, key_mask=None, depth=0):
    d, base, groups = D // 2, layer.spec.rotary_base, layer.spec.kv_heads
    init = 0.8 - 0.6 * math.exp(-0.3 * depth)
    (lambda_q1, lambda_k1), (lambda_q2, lambda_k2) = layer.lambda_vectors
    weight = torch.exp(lambda_q1 @ lambda_k1) - torch.exp(lambda_q2 @ lambda_k2) + init

    def turned(half, position):  # pairs (j, j + d / 2) as complex numbers; angles in float32, as in the program
        if base is None or layer.spec.cross:
            return half
        angle = position * base ** (-torch.arange(d // 2, dtype=torch.float32) / (d // 2))
        value = torch.complex(half[: d // 2], half[d // 2 :]) * torch.complex(
            angle.cos().double(), angle.sin().double()
        )
        return torch.cat([value.real, value.imag])

    def halves(projection, h, vector, position):
        full = projection.weight[h * D : (h + 1) * D] @ vector
        return turned(full[:d], position), turned(full[d:], position)

    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            keys = [j for j in range(i + 1 if causal else source.shape[1]) if key_mask is None or key_mask[b, j]]
            heads = []
            for h in range(H):
                g = h * groups // H
                q = halves(layer.q_proj, h, x[b, i], i)
                scores = [[], []]
                for j in keys:
                    k = halves(layer.k_proj, g, source[b, j], j)
                    for m in (0, 1):
                        scores[m].append(torch.exp(q[m] @ k[m] / math.sqrt(d)))
                head = torch.zeros(D, dtype=x.dtype)
                for n, j in enumerate(keys):
                    share = scores[0][n] / sum(scores[0]) - weight * scores[1][n] / sum(scores[1])
                    head = head + share * (layer.v_proj.weight[g * D : (g + 1) * D] @ source[b, j])
                size = ((head * head).sum() / D + 1e-5).sqrt()
                heads.append((1 - init) * layer.norm_weight * head / size)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize(("num_kv_heads", "rotary_base"), [(3, None), (3, 100.0), (1, 100.0)])
def test_causal_self_attention_equals_the_formula(num_kv_heads, rotary_base, make_layer, agree):
    layer = make_layer(Differential, dim=M, num_heads=H, num_kv_heads=num_kv_heads, rotary_base=rotary_base)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_masked_keys_are_not_read_by_either_map(causal, make_layer, agree):
    layer = make_layer(Differential, dim=M, num_heads=H, causal=causal)
    x = torch.randn(B, S, M, dtype=torch.float64)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # causal: the first two queries of row 0 see nothing
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, causal, mask), inputs)
    if causal:
        assert layer(x, key_mask=mask)[0, :2].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_the_whole_context_without_rotation(causal, make_layer, agree):
    layer = make_layer(Differential, dim=M, num_heads=H, causal=causal, cross=True, rotary_base=100.0)
    x, context = torch.randn(B, 3, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, False), inputs)


def test_equal_halves_leave_one_softmax_map_times_one_minus_lambda(make_layer):
    layer, softmax = make_layer(Differential, dim=M, num_heads=H), make_layer(Softmax, dim=M, num_heads=H)
    q, k, v = (torch.randn(B, T, H, width, dtype=torch.float64) for width in (D // 2, D // 2, D))
    heads = layer.attend(torch.cat([q, q], -1), torch.cat([k, k], -1), v)
    torch.testing.assert_close(heads, (1 - layer.second_weight()) * softmax.attend(q, k, v))


def test_lambda_starts_near_its_depth_in_every_layer():
    for layer, init in ((0, 0.2), (1, 0.8 - 0.6 * math.exp(-0.3)), (7, 0.8 - 0.6 * math.exp(-2.1))):
        torch.manual_seed(layer)
        module = Differential(LayerSpec(dim=64, num_heads=2, causal=True, layer=layer, num_layers=8))
        assert module.lambda_init == pytest.approx(init)
        assert abs(module.second_weight().item() - init) < 0.2  # each dot product: 16 terms of size 0.01


def test_depth_enters_the_formula(make_layer, agree):
    torch.manual_seed(0)
    layer = Differential(LayerSpec(dim=M, num_heads=H, causal=True, layer=2, num_layers=3)).double()
    x = torch.randn(B, S, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True, depth=2), [x, *layer.parameters()])


def test_it_has_the_parameters_and_the_state_of_softmax_attention(make_layer):
    layer, softmax = (make_layer(kind, dim=M, num_heads=H).float() for kind in (Differential, Softmax))
    count, plain = (sum(p.numel() for p in module.parameters()) for module in (layer, softmax))
    assert count == plain + 3 * D
    assert layer.prefill(torch.randn(1, T, M))[1].nbytes == softmax.state_bytes(T)


@pytest.mark.parametrize(
    ("dim", "rotary_base", "message"),
    [
        (15, None, "multiple of 2, got 5; nearest: 4, 6"),
        (3, None, "multiple of 2, got 1; nearest: 2"),
        (30, 100.0, "rotary positions pair each half.*multiple of 4, got 10; nearest: 8, 12"),
    ],
)
def test_widths_that_cannot_be_halved_are_refused(dim, rotary_base, message):
    with pytest.raises(ValueError, match=message):
        Differential(LayerSpec(dim=dim, num_heads=3, causal=True, rotary_base=rotary_base))
