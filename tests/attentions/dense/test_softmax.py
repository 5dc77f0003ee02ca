"""Softmax attention against eq. 1 of Vaswani et al. as loops over rows, heads and positions."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax

B, T, S, M, H = 2, 11, 7, 60, 6


def make(*, num_kv_heads=None, rotary_base=None, causal=True, cross=False, **keywords):
    torch.manual_seed(0)
    spec = LayerSpec(dim=M, num_heads=H, num_kv_heads=num_kv_heads, causal=causal, cross=cross, rotary_base=rotary_base)
    return Softmax(spec, **keywords).double()


def stream(length=T, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(layer, x, source, causal, key_mask=None):
    """o_i = sum_j exp(q_i.k_j / sqrt(D)) v_j / sum_j exp(q_i.k_j / sqrt(D)) over the visible j."""
    width = M // H
    base = layer.spec.rotary_base

    def turned(vector, position):  # pairs (j, j + D / 2) as complex numbers; angles in float32, as in the program
        if base is None:
            return vector
        half = width // 2
        angle = position * base ** (-torch.arange(half, dtype=torch.float32) / half)
        turn = torch.complex(angle.cos().double(), angle.sin().double())
        value = torch.complex(vector[:half], vector[half:]) * turn
        return torch.cat([value.real, value.imag])

    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                q = turned(layer.q_proj.weight[own] @ x[b, i], i)
                total, norm = torch.zeros(width, dtype=x.dtype), 0.0
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask is None or key_mask[b, j]:
                        score = q @ turned(layer.k_proj.weight[shared] @ source[b, j], j) / math.sqrt(width)
                        total = total + score.exp() * (layer.v_proj.weight[shared] @ source[b, j])
                        norm = norm + score.exp()
                heads.append(total / norm if isinstance(norm, torch.Tensor) else total)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


def agree(layer, x, context=None, *, causal, key_mask=None):
    inputs = [tensor.requires_grad_() for tensor in (x, context, *layer.parameters()) if tensor is not None]
    got = layer(x, context, key_mask=key_mask)
    want = naive(layer, x, x if context is None else context, causal, key_mask)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)  # float64
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), inputs) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rotary_base", [None, 100.0])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_causal_self_attention_equals_the_formula(num_kv_heads, rotary_base):
    agree(make(num_kv_heads=num_kv_heads, rotary_base=rotary_base), stream(), causal=True)


@pytest.mark.parametrize("causal", [True, False])
def test_masked_keys_are_not_read_and_a_query_without_keys_reads_zero(causal):
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # causal: the first two queries of row 0 see nothing
    layer, x = make(causal=causal), stream()
    agree(layer, x, causal=causal, key_mask=mask)
    if causal:
        assert layer(x, key_mask=mask)[0, :2].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_the_whole_context_without_rotation(causal):
    mask = torch.arange(S).expand(B, -1) != 4
    layer = make(causal=causal, cross=True)
    agree(layer, stream(), stream(S, seed=5), causal=False, key_mask=mask)
    turned = make(causal=causal, cross=True, rotary_base=100.0)
    context = stream(S, seed=5)
    torch.testing.assert_close(turned(stream(), context), layer(stream(), context))


@pytest.mark.parametrize("rotary_base", [None, 100.0])
def test_step_by_step_equals_all_at_once_equals_prefill(rotary_base):
    layer, x = make(num_kv_heads=2, rotary_base=rotary_base), stream()
    want = layer(x)
    output, state = layer.prefill(x[:, :5])
    torch.testing.assert_close(output, want[:, :5])
    for t in range(5, T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    assert state.nbytes == 2 * B * T * 2 * (M // H) * 8  # keys and values of two shared heads, float64


def test_cross_attention_decodes_over_a_masked_context():
    layer, x, context = make(cross=True), stream(), stream(S, seed=5)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.4
    want, state = layer(x, context, key_mask=mask), layer.init_state(B, context, key_mask=mask)
    for t in range(T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])


def test_dropout_acts_in_training_only():
    layer, x = make(dropout=0.5), stream()
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), make()(x))
