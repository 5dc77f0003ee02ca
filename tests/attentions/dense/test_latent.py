"""Latent attention against the equations of section 2.1 of DeepSeek-V2 as loops over rows, heads and positions."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.latent import Latent
from attentions.dense.softmax import Softmax

B, T, S, M, H, D = 2, 7, 5, 36, 3, 12  # rotary: d_R = 6, three pairs


def compressed(module, x):
    """RMSNorm(W x) of one position."""
    latent = module.down_proj.weight @ x
    return module.norm_weight * latent / ((latent * latent).mean() + 1e-6).sqrt()


def naive(layer, x, source, causal, key_mask=None, q_ratio=None):
    base = None if layer.spec.cross else layer.spec.rotary_base
    r = 0 if base is None else 6

    def turned(vector, position):  # pairs (j, j + r / 2) as complex numbers; angles in float32, as in the program
        if base is None:
            return vector
        angle = position * base ** (-torch.arange(r // 2, dtype=torch.float32) / (r // 2))
        turn = torch.complex(angle.cos().double(), angle.sin().double())
        value = torch.complex(vector[: r // 2], vector[r // 2 :]) * turn
        return torch.cat([value.real, value.imag])

    rows = []
    for b in range(B):
        latents = [compressed(layer.kv_latent, vector) for vector in source[b]]
        for i in range(x.shape[1]):
            query = x[b, i] if q_ratio is None else compressed(layer.q_latent, x[b, i])
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own = layer.q_proj.weight[h * (D + r) : (h + 1) * (D + r)] @ query
                q, q_turned = own[:D], turned(own[D:], i)
                total, norm = torch.zeros(D, dtype=x.dtype), 0.0
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask is not None and not key_mask[b, j]:
                        continue
                    score = q @ (layer.k_proj.weight[g * D : (g + 1) * D] @ latents[j])
                    if base is not None:
                        score = score + q_turned @ turned(layer.rotary_proj.weight @ source[b, j], j)
                    weight = torch.exp(score / math.sqrt(D + r))
                    total = total + weight * (layer.v_proj.weight[g * D : (g + 1) * D] @ latents[j])
                    norm = norm + weight
                heads.append(total / norm if isinstance(norm, torch.Tensor) else total)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize(
    ("num_kv_heads", "rotary_base", "q_ratio"), [(3, None, None), (3, 100.0, None), (1, 100.0, 1.5), (3, None, 0.5)]
)
def test_causal_self_attention_equals_the_equations(num_kv_heads, rotary_base, q_ratio, make_layer, agree):
    options = {"num_kv_heads": num_kv_heads, "rotary_base": rotary_base, "q_ratio": q_ratio, "kv_ratio": 0.6}
    layer = make_layer(Latent, dim=M, num_heads=H, **options)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True, None, q_ratio), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_masked_keys_are_not_read(causal, make_layer, agree):
    layer = make_layer(Latent, dim=M, num_heads=H, causal=causal, rotary_base=100.0)
    x = torch.randn(B, T, M, dtype=torch.float64)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # causal: the first two queries of row 0 see nothing
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, causal, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_has_no_rotary_part(causal, make_layer, agree):
    layer = make_layer(Latent, dim=M, num_heads=H, causal=causal, cross=True, rotary_base=100.0)
    x, context = torch.randn(B, 3, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, False), inputs)


@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize(("cross", "rotary_base"), [(False, None), (False, 100.0), (True, None)])
def test_the_absorbed_form_equals_projecting_up(cross, rotary_base, num_kv_heads, make_layer, agree):
    """Reading the latents with W_UK^T q is reading the keys W_UK c with q: values and gradients."""
    options = {"cross": cross, "rotary_base": rotary_base, "num_kv_heads": num_kv_heads}
    layer = make_layer(Latent, dim=M, num_heads=H, kv_ratio=0.6, causal=False, **options)
    x, source = torch.randn(B, T, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    mask = torch.arange(S).expand(B, -1) != 2

    def absorbed():
        state = layer.update(layer.init_memory(B, x), *layer.key_value(source), key_mask=mask)
        return layer.read(layer.query(x, S), state)

    def projected():
        return layer.attend(layer.query(x, S), *layer.key_value(source), key_mask=mask)

    parameters = [p for name, p in layer.named_parameters() if name != "out_proj.weight"]
    agree(absorbed, projected, [x, source, *parameters])


@pytest.mark.parametrize(("rotary_base", "width"), [(None, 7), (100.0, 7 + 6)])
def test_the_state_holds_the_latent_and_the_rotary_key_only(rotary_base, width, make_layer):
    options = {"dim": M, "num_heads": H, "rotary_base": rotary_base}
    layer = make_layer(Latent, kv_ratio=0.6, **options).float()
    x = torch.randn(1, T, M)
    want, (output, state) = layer(x), layer.prefill(x[:, :3])
    for t in range(3, T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-4, atol=1e-5)  # float32, two orders of sums
    assert state.nbytes == layer.state_bytes(T) == 4 * T * width
    assert make_layer(Softmax, **options).state_bytes(T) == 4 * T * 2 * M


@pytest.mark.parametrize(("rotary_base", "ratio"), [(None, (2 + 3 / 2) / 4), (100.0, (2.5 + 3.5 / 2) / 4)])
def test_parameters_are_those_of_the_docstring(rotary_base, ratio):
    spec = LayerSpec(dim=32, num_heads=2, causal=True, rotary_base=rotary_base)
    count, plain = (sum(p.numel() for p in m.parameters()) for m in (Latent(spec, kv_ratio=1.0), Softmax(spec)))
    assert count == ratio * plain + 16  # and the norm


def test_published_widths():
    """d_c = 512, d_c' = 1536 and d_R = 64 for heads of 128."""
    layer = Latent(LayerSpec(dim=256, num_heads=2, causal=True, rotary_base=10000.0), q_ratio=12.0)
    assert (layer.latent_dim, layer.rotary_dim, layer.q_latent.down_proj.out_features) == (512, 64, 1536)


@pytest.mark.parametrize("name", ["kv_ratio", "q_ratio", "rotary_ratio"])
def test_a_latent_without_width_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        Latent(LayerSpec(dim=36, num_heads=3, causal=True), **{name: 0})
