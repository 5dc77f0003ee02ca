"""Selective self-attention as loops over rows, heads and positions with a temperature for each query and value."""

import math

import pytest
import torch

from attentions.base import LayerSpec, rotary
from attentions.dense.selective import Selective, SelectivePosOfficial
from attentions.dense.softmax import Softmax

B, T, S, M, H, D = 2, 7, 5, 18, 3, 6


def gelu(vector):
    return vector * 0.5 * (1 + torch.erf(vector / math.sqrt(2)))


def naive(layer, x, source, causal, key_mask):
    base, groups, full = layer.spec.rotary_base, layer.spec.kv_heads, isinstance(layer, Selective)

    def turned(vector, position):
        if base is None or layer.spec.cross:
            return vector
        return rotary(vector[None, None, None], base=base, start=position)[0, 0, 0]

    def temperature(which, weight, vector, count):
        if not full:
            return 1 + torch.exp(-torch.exp(layer.beta)) * math.log(count)
        position = 1 + math.log(count) / (1 + torch.exp(-layer.alpha[which]))
        return torch.tanh((weight * gelu(vector)).sum()) + position

    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            keys = [j for j in range(i + 1 if causal else source.shape[1]) if key_mask is None or key_mask[b, j]]
            heads = []
            for h in range(H):
                g = h * groups // H
                q = layer.q_proj.weight[h * D : (h + 1) * D] @ x[b, i]
                tau = temperature(0, layer.query_weight[h] if full else None, q, max(1, len(keys)))
                head, norm = torch.zeros(D, dtype=x.dtype), 0.0
                for n, j in enumerate(keys):
                    k = turned(layer.k_proj.weight[g * D : (g + 1) * D] @ source[b, j], j)
                    v = layer.v_proj.weight[g * D : (g + 1) * D] @ source[b, j]
                    if full:
                        v = v * temperature(1, layer.value_weight[g], v, n + 1 if causal else len(keys))
                    weight = torch.exp(tau * (turned(q, i) @ k) / math.sqrt(D))
                    head, norm = head + weight * v, norm + weight
                heads.append(head / norm if keys else head)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize(("num_kv_heads", "rotary_base"), [(3, None), (3, 100.0), (1, 100.0)])
@pytest.mark.parametrize("kind", [Selective, SelectivePosOfficial])
def test_causal_self_attention_equals_the_formula(kind, num_kv_heads, rotary_base, make_layer, agree):
    layer = make_layer(kind, dim=M, num_heads=H, num_kv_heads=num_kv_heads, rotary_base=rotary_base)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True, None), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [Selective, SelectivePosOfficial])
def test_masked_keys_are_not_counted(kind, causal, make_layer, agree):
    layer = make_layer(kind, dim=M, num_heads=H, causal=causal)
    x = torch.randn(B, T, M, dtype=torch.float64)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # causal: the first two queries of row 0 see nothing
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, causal, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [Selective, SelectivePosOfficial])
def test_in_cross_attention_the_whole_context_is_in_sight(kind, causal, make_layer, agree):
    layer = make_layer(kind, dim=M, num_heads=H, causal=causal, cross=True, rotary_base=100.0)
    x, context = torch.randn(B, 3, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, False, None), inputs)


def neutral(layer):
    """Every temperature 1."""
    with torch.no_grad():
        if isinstance(layer, Selective):
            layer.alpha.fill_(-math.inf)
            layer.query_weight.zero_()
            layer.value_weight.zero_()
        else:
            layer.beta.fill_(math.inf)
    return layer


@pytest.mark.parametrize("kind", [Selective, SelectivePosOfficial])
def test_temperatures_of_one_are_softmax_attention(kind, make_layer):
    layer, softmax = neutral(make_layer(kind, dim=M, num_heads=H)), make_layer(Softmax, dim=M, num_heads=H)
    softmax.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(B, T, M, dtype=torch.float64)
    torch.testing.assert_close(layer(x), softmax(x))


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_temperature_of_zero_reads_the_mean_of_the_values(causal, make_layer):
    layer = neutral(make_layer(Selective, dim=M, num_heads=H, causal=causal))
    x = torch.randn(B, T, M, dtype=torch.float64)
    x[..., 0] = 1.0
    with torch.no_grad():  # channel 0 of each query is 1, and tanh(-1e6 GELU(1)) + 1 is 0
        layer.q_proj.weight.view(H, D, M)[:, 0] = torch.eye(M, dtype=torch.float64)[0]
        layer.query_weight[:, 0] = -1e6
    values = layer.v_proj(x)
    counts = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    mean = values.cumsum(1) / counts if causal else values.mean(1, keepdim=True).expand(-1, T, -1)
    torch.testing.assert_close(layer(x), layer.out_proj(mean))


def test_a_large_query_temperature_reads_the_best_key(make_layer):
    layer = make_layer(SelectivePosOfficial, dim=M, num_heads=H)
    q, k, v = (torch.randn(B, T, H, D, dtype=torch.float64) for _ in range(3))
    best = torch.einsum("bthd,bshd->bhts", q, k).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).argmax(-1)
    expected = v.transpose(1, 2).gather(2, best[..., None].expand(-1, -1, -1, D)).transpose(1, 2)
    torch.testing.assert_close(layer.attend(1e6 * q, k, v), expected)


def test_both_start_from_the_published_position_term():
    spec = LayerSpec(dim=32, num_heads=2, causal=True)
    selective, official = Selective(spec), SelectivePosOfficial(spec)
    weight = math.exp(-math.exp(1.5))
    assert weight == pytest.approx(0.0113, rel=1e-2)
    assert math.exp(-math.exp(official.beta.item())) == pytest.approx(weight)
    assert selective.alpha.sigmoid().tolist() == pytest.approx([weight] * 2)


def test_parameters_are_one_or_two_per_channel_and_the_state_is_softmax_attentions():
    spec = LayerSpec(dim=32, num_heads=2, causal=True)
    softmax = Softmax(spec)
    plain = sum(p.numel() for p in softmax.parameters())
    for layer, more in ((Selective(spec), 2 * 32 + 2), (SelectivePosOfficial(spec), 1)):
        assert sum(p.numel() for p in layer.parameters()) == plain + more
        assert layer.prefill(torch.randn(1, T, 32))[1].nbytes == softmax.state_bytes(T)


@torch.no_grad()
def test_bfloat16_counts_past_256_positions():
    layer = SelectivePosOfficial(LayerSpec(dim=8, num_heads=1, causal=True), beta=-9.0).bfloat16()
    state = layer.prefill(torch.randn(1, 1000, 8).bfloat16())[1]
    q = torch.ones(1, 1, 1, 8).bfloat16()
    seen = []
    layer.sharpen = lambda q, count: seen.append(count) or q
    layer.read(q, state)
    assert seen[0].item() == 1000
    del layer.sharpen
    assert layer.sharpen(q, seen[0]).flatten()[0].item() == pytest.approx(1 + math.log(1000), rel=1e-2)
