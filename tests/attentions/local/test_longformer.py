"""Longformer against a loop over the positions that each query may read."""

import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.dense.softmax import Softmax
from attentions.local.longformer import Longformer
from attentions.local.sliding_window import SlidingWindow

B, T, M, H = 2, 13, 20, 4


def stream():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(layer, x, *, window, num_global, dilation=1, key_mask=None):
    """Sets of readable positions, one softmax over each; a global query of the noncausal form has Q_g, K_g, V_g."""
    causal, width, G = layer.spec.causal, M // H, layer.spec.kv_heads
    rows = []
    for b in range(B):
        for i in range(T):
            heads = []
            for h in range(H):
                d = dilation[h] if isinstance(dilation, list) else dilation
                near = {i + sign * a * d for a in range(window) for sign in (-1, 1)}
                everything = not causal and i < num_global
                keys = [j for j in range(i + 1 if causal else T) if everything or j in near or j < num_global]
                keys = [j for j in keys if key_mask is None or key_mask[b, j]]
                names = ("q_global", "k_global", "v_global") if everything and layer.separate else None
                wq, wk, wv = (getattr(layer, name).weight for name in names or ("q_proj", "k_proj", "v_proj"))
                own, shared = (slice(n * width, (n + 1) * width) for n in (h, h * G // H))
                q = wq[own] @ x[b, i]
                weights = [torch.exp(q @ (wk[shared] @ x[b, j]) / math.sqrt(width)) for j in keys]
                read = sum((w * (wv[shared] @ x[b, j]) for w, j in zip(weights, keys, strict=True)), 0 * q)
                heads.append(read / sum(weights) if keys else read)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, T, M)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "num_global", "dilation"), [(1, 2, 1), (3, 2, 1), (5, 0, 1), (2, 6, 3)])
def test_each_query_reads_its_window_and_the_global_tokens(
    window, num_global, dilation, causal, num_kv_heads, make_layer, agree
):
    layout = {"window": window, "num_global": num_global, "dilation": dilation}
    layer = make_layer(Longformer, dim=M, num_heads=H, causal=causal, num_kv_heads=num_kv_heads, **layout)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4  # global tokens among the masked
    assert not mask[:, :2].all()
    x = stream()
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask, **layout), [x, *layer.parameters()])
    torch.testing.assert_close(layer(x), naive(layer, x, **layout), rtol=1e-9, atol=1e-10)  # float64


@pytest.mark.parametrize("causal", [True, False])
def test_each_head_has_its_own_dilation(causal, make_layer, agree):
    layout = {"window": 3, "num_global": 2, "dilation": [1, 3, 2, 3]}
    layer, x = make_layer(Longformer, dim=M, num_heads=H, causal=causal, num_kv_heads=2, **layout), stream()
    agree(lambda: layer(x), lambda: naive(layer, x, **layout), [x, *layer.parameters()])


def test_shared_projections_are_those_of_the_window(make_layer, agree):
    layer, x = (
        make_layer(Longformer, dim=M, num_heads=H, causal=False, window=3, num_global=2, separate_global=False),
        stream(),
    )
    agree(lambda: layer(x), lambda: naive(layer, x, window=3, num_global=2), [x, *layer.parameters()])
    apart = make_layer(Longformer, dim=M, num_heads=H, causal=False, window=3, num_global=2)
    causal = make_layer(Longformer, dim=M, num_heads=H, causal=True, window=3, num_global=2)
    count = [sum(parameter.numel() for parameter in each.parameters()) for each in (layer, apart, causal)]
    assert count == [4 * M * M, 7 * M * M, 4 * M * M]


@pytest.mark.parametrize("causal", [True, False])
def test_without_global_tokens_it_is_a_sliding_window_and_with_all_of_them_softmax(causal, make_layer):
    x, plain = stream(), {"causal": causal}
    layer = make_layer(Longformer, dim=M, num_heads=H, window=4, num_global=0, **plain)
    torch.testing.assert_close(layer(x), make_layer(SlidingWindow, dim=M, num_heads=H, window=4, **plain)(x))
    layer = make_layer(Longformer, dim=M, num_heads=H, window=1, num_global=T + 2, separate_global=False, **plain)
    torch.testing.assert_close(layer(x), make_layer(Softmax, dim=M, num_heads=H, **plain)(x))


@pytest.mark.parametrize("prompt", [1, 4, 11])  # within the global tokens, within the first window, behind it
@pytest.mark.parametrize("dilation", [1, [1, 2, 1, 2]])
def test_decoding_keeps_the_window_and_the_global_tokens_only(dilation, prompt, make_layer):
    layer, x = make_layer(Longformer, dim=M, num_heads=H, window=4, num_global=3, dilation=dilation), stream()
    want = layer(x)
    output, state = layer.prefill(x[:, :prompt])
    torch.testing.assert_close(output, want[:, :prompt])
    for t in range(prompt, T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.nbytes == 2 * B * layer.state_bytes(t + 1)  # float64
    assert state.k.shape[1] == 3 + (4 if dilation == 1 else 7)
    held = state.k.untyped_storage().nbytes() + state.v.untyped_storage().nbytes()
    assert held == state.nbytes, "a view keeps the dropped positions alive"


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 4, "num_global": -1}, "num_global must be at least 0, got -1"),
        ({"window": 4, "dilation": 0}, "dilation must be at least 1, got 0"),
        ({"window": 4, "dilation": [1, 2]}, "dilation needs one number or 4, one per head, got 2"),
    ],
)
def test_bad_values_are_refused(keywords, words, make_layer):
    with pytest.raises(ValueError, match=words):
        make_layer(Longformer, dim=M, num_heads=H, **keywords)


def test_cross_attention_has_no_window():
    with pytest.raises(UnsupportedPattern, match="share no positions"):
        Longformer(LayerSpec(dim=M, num_heads=H, causal=False, cross=True), window=4)
