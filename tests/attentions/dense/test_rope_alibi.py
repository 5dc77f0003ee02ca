"""RoPE x ALiBi against its formula as loops over heads and positions, and against its two halves."""

import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.dense.rope_alibi import RopeAlibi
from attentions.dense.softmax import Softmax

B, T, M, H, D = 2, 7, 24, 6, 4


def stream(length=T):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(layer, x, base, slope, mask=None):
    def turned(vector, position):  # pairs (j, j + D / 2) as complex numbers; angles in float32, as in the program
        if base is None:
            return vector
        angle = position * base ** (-torch.arange(D // 2, dtype=torch.float32) / (D // 2))
        turn = torch.complex(angle.cos().double(), angle.sin().double())
        value = torch.complex(vector[: D // 2], vector[D // 2 :]) * turn
        return torch.cat([value.real, value.imag])

    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g, terms = h * layer.spec.kv_heads // H, []
                q = turned(layer.q_proj.weight[h * D : (h + 1) * D] @ x[b, i], i)
                for j in range(i + 1 if layer.spec.causal else x.shape[1]):
                    if mask is None or mask[b, j]:
                        k = turned(layer.k_proj.weight[g * D : (g + 1) * D] @ x[b, j], j)
                        score = q @ k / math.sqrt(D) - slope / (h + 1) * abs(i - j)
                        terms.append((torch.exp(score), layer.v_proj.weight[g * D : (g + 1) * D] @ x[b, j]))
                total = sum(weight for weight, _ in terms)
                heads.append(sum(weight / total * v for weight, v in terms) if terms else 0.0 * q)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_kv_heads", "own_base", "slot_base", "slope", "masked"),
    [(6, 100.0, None, 1.0, False), (2, 100.0, 30.0, 0.5, True), (3, None, None, 1.0, False)],
)
def test_it_is_the_formula(causal, num_kv_heads, own_base, slot_base, slope, masked, make_layer, agree):
    keywords = {"num_kv_heads": num_kv_heads, "rotary_base": slot_base, "slope": slope}
    layer = make_layer(with_base(own_base), dim=M, num_heads=H, causal=causal, **keywords)
    x, mask = stream(), None
    if masked:
        mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
        mask[0, :2] = False  # causal: two queries without a key
    base = own_base if slot_base is None else slot_base
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, base, slope, mask), [x, *layer.parameters()])


def with_base(base):
    """The class with its own keyword filled in: `make_layer` gives rotary_base to the slot."""
    return lambda spec, **keywords: RopeAlibi(spec, rotary_base=base, **keywords)


@pytest.mark.parametrize("causal", [True, False])
def test_without_slope_it_is_rotary_softmax_attention(causal, make_layer):
    layer = make_layer(with_base(100.0), dim=M, num_heads=H, causal=causal, slope=0.0)
    softmax = make_layer(Softmax, dim=M, num_heads=H, causal=causal, rotary_base=100.0)
    torch.testing.assert_close(layer(stream()), softmax(stream()))


def test_without_rotation_equal_keys_fall_off_by_one_over_the_head(make_layer):
    layer = make_layer(with_base(None), dim=M, num_heads=H)
    q, k = torch.zeros(2, 1, 9, H, D, dtype=torch.float64)
    v = torch.eye(9, dtype=torch.float64)[None, :, None].expand(-1, -1, H, -1)
    weights = layer.attend(q, k, v)[0, 8]  # [H, 9]: of the last query
    ratio = weights[:, 1:] / weights[:, :-1]
    slopes = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6], dtype=torch.float64)
    torch.testing.assert_close(ratio.log(), slopes[:, None].expand(-1, 8))


def test_decoding_equals_all_at_once(make_layer):
    layer, x = make_layer(with_base(100.0), dim=M, num_heads=H, num_kv_heads=2), stream(13)
    want = layer(x)
    output, state = layer.prefill(x[:, :5])
    torch.testing.assert_close(output, want[:, :5])
    for t in range(5, 13):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])


def test_defaults_and_bad_values(make_layer):
    layer = make_layer(RopeAlibi)
    assert (layer.rotary_base, layer.slope) == (10000.0, 1.0)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 60 * 60
    with pytest.raises(ValueError, match="slope must be at least 0, got -1"):
        RopeAlibi(LayerSpec(dim=M, num_heads=H, causal=True), slope=-1.0)
    with pytest.raises(ValueError, match="even key width per head, got 3; nearest: 2, 4"):
        RopeAlibi(LayerSpec(dim=18, num_heads=6, causal=True))
    with pytest.raises(UnsupportedPattern, match="both terms need a distance"):
        RopeAlibi(LayerSpec(dim=M, num_heads=H, causal=False, cross=True))
