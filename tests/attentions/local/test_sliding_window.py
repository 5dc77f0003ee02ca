"""Sliding windows against a loop over the positions they contain."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.local.sliding_window import SlidingWindow

B, T, M, H = 2, 19, 60, 6


def make(layer_class=SlidingWindow, *, causal=True, num_kv_heads=None, rotary_base=None, **keywords):
    torch.manual_seed(0)
    spec = LayerSpec(dim=M, num_heads=H, num_kv_heads=num_kv_heads, causal=causal, rotary_base=rotary_base)
    return layer_class(spec, **keywords).double()


def stream():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(layer, x, window, causal, key_mask=None):
    width = M // H
    rows = []
    for b in range(B):
        for i in range(T):
            last = i if causal else min(T - 1, i + window - 1)
            keys = [j for j in range(max(0, i - window + 1), last + 1) if key_mask is None or key_mask[b, j]]
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                q = layer.q_proj.weight[own] @ x[b, i]
                weights = [torch.exp(q @ layer.k_proj.weight[shared] @ x[b, j] / math.sqrt(width)) for j in keys]
                values = [layer.v_proj.weight[shared] @ x[b, j] for j in keys]
                read = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) if keys else 0 * q
                heads.append(read)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, T, M)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 5])
def test_each_query_reads_its_window_and_nothing_else(window, causal, num_kv_heads):
    layer, x = make(window=window, causal=causal, num_kv_heads=num_kv_heads), stream()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4  # some windows hold no key
    for key_mask in (None, mask):
        inputs = [x.requires_grad_(), *layer.parameters()]
        got, want = layer(x, key_mask=key_mask), naive(layer, x, window, causal, key_mask)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)  # float64
        direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
        for a, b in zip(*(torch.autograd.grad((y * direction).sum(), inputs) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [T, T + 3])
def test_a_window_of_the_whole_sequence_is_softmax_attention(window, causal):
    got = make(window=window, causal=causal, rotary_base=100.0)(stream())
    torch.testing.assert_close(got, make(Softmax, causal=causal, rotary_base=100.0)(stream()))
    assert not torch.allclose(make(window=T - 1, causal=causal, rotary_base=100.0)(stream()), got)


@pytest.mark.parametrize("window", [1, 5])
def test_decoding_keeps_the_window_only(window):
    layer, x = make(window=window, rotary_base=100.0), stream()
    want = layer(x)
    output, state = layer.prefill(x[:, :7])
    torch.testing.assert_close(output, want[:, :7])
    for t in range(7, T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    assert state.nbytes == 2 * B * window * M * 8
    held = state.k.untyped_storage().nbytes() + state.v.untyped_storage().nbytes()
    assert held == state.nbytes, "a view keeps the dropped positions alive"


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        make(window=0)


def test_the_declared_cost_is_the_counted_one():
    """All positions at once form every score, whatever the window; a step forms those of its window."""
    counts = {}
    for window in (2, 8):
        layer, x = make(window=window), stream()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts no fused kernel
            layer(x)
        state = layer.prefill(x)[1]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step_counter:
            layer.step(x[:, :1], state)
        counts[window] = counter.get_total_flops(), step_counter.get_total_flops()
    assert counts[2][0] == counts[8][0] and counts[2][1] < counts[8][1]
    assert SlidingWindow.complexity.split(",")[0] == Softmax.complexity == "T S"
    assert SlidingWindow.complexity.endswith("step by step T window")
