"""Aaren against the softmax of its query over every prefix, and its scan against plain softmax attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.linear.aaren import Aaren, join, mean, prefixes

B, T, M, H = 2, 13, 60, 6
WIDTH = M // H


def naive(layer, x, context=None, key_mask=None):
    """softmax_j(q.k_j / sqrt(D)) v_j over the prefix; noncausal: the mean of prefix and suffix; cross: over all."""
    source = x if context is None else context
    length = source.shape[1]
    query = layer.q_proj.weight @ layer.token
    rows = []
    for b in range(B):
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                q, shared = query[h * WIDTH : (h + 1) * WIDTH], slice(g * WIDTH, (g + 1) * WIDTH)
                ranges = [range(length)] if layer.spec.cross else [range(t + 1)]
                if not layer.spec.causal and not layer.spec.cross:
                    ranges.append(range(t, length))
                reads = []
                for positions in ranges:
                    seen = [j for j in positions if key_mask is None or key_mask[b, j]]
                    weights = [
                        (q @ (layer.k_proj.weight[shared] @ source[b, j]) / math.sqrt(WIDTH)).exp() for j in seen
                    ]
                    total = torch.zeros(WIDTH, dtype=x.dtype)
                    for j, weight in zip(seen, weights, strict=True):
                        total = total + weight * (layer.v_proj.weight[shared] @ source[b, j])
                    reads.append(total / sum(weights) if seen else total)
                heads.append(torch.stack(reads).mean(0))
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(x.shape)


def stream(length=T):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_the_softmax_over_each_prefix(causal, num_kv_heads, make_layer, agree):
    layer, x = make_layer(Aaren, dim=M, causal=causal, num_kv_heads=num_kv_heads), stream()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0, :3] = False  # the first queries of a row see no key and read zero
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x), lambda: naive(layer, x), inputs)
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), inputs)


def test_cross_attention_pools_the_context_whatever_the_queries_are(make_layer, agree):
    layer = make_layer(Aaren, dim=M, causal=False, cross=True, num_kv_heads=2)
    x, context = stream(5), torch.randn(B, 11, M, dtype=torch.float64)
    mask = torch.rand(B, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [context, *layer.parameters()]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), inputs)
    output = layer(x, context)
    assert output.equal(layer(x + 1, context))
    torch.testing.assert_close(output, output[:, :1].expand_as(output), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 37, 64, 65])
def test_the_scan_equals_causal_softmax_attention_with_the_query_repeated(length, make_layer):
    layer = make_layer(Aaren, dim=M)
    k, v = torch.randn(2, B, length, H, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = torch.randn(1, 1, H, WIDTH, dtype=torch.float64).expand(B, length, -1, -1)
    want = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    torch.testing.assert_close(layer.attend(q, k, v), want.transpose(1, 2), rtol=1e-9, atol=1e-10)


def test_step_by_step_equals_all_at_once_equals_prefill(make_layer):
    layer, x = make_layer(Aaren, dim=M, num_kv_heads=2), stream(37)
    want, state, outputs = layer(x), layer.init_state(B), []
    for t in range(37):
        output, state = layer.step(x[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-9, atol=1e-10)
    _, middle = layer.prefill(x[:, :23])
    for t in range(23, 37):
        output, middle = layer.step(x[:, t : t + 1], middle)
        torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-9, atol=1e-10)


def test_joining_is_associative_and_a_stretch_of_nothing_changes_nothing():
    def some(seed):
        generator = torch.Generator().manual_seed(seed)
        peak, sums = (torch.randn(7, width, generator=generator, dtype=torch.float64) for width in (1, 5))
        return 50 * peak, sums

    a, b, c = (some(seed) for seed in range(3))
    torch.testing.assert_close(join(join(a, b), c), join(a, join(b, c)), rtol=1e-12, atol=1e-12)
    nothing = torch.full((7, 1), -1e30, dtype=torch.float64), torch.zeros(7, 5, dtype=torch.float64)
    torch.testing.assert_close(join(a, nothing), a)
    torch.testing.assert_close(join(nothing, a), a)


def test_logits_of_ten_thousand_either_way_stay_exact_and_finite(make_layer):
    """float32 on both sides: a running maximum keeps every exponent at most 0."""
    layer = make_layer(Aaren, dim=M).float()
    logits = 1e4 * (2 * torch.rand(B, 41, H, generator=torch.Generator().manual_seed(1)) - 1)
    logits[:, 0], logits[:, 1] = -1e4, 1e4
    q = torch.zeros(1, 1, H, WIDTH)
    q[..., 0] = math.sqrt(WIDTH)
    k = F.pad(logits[..., None], (0, WIDTH - 1)).requires_grad_()
    v = torch.randn(B, 41, H, WIDTH, requires_grad=True)
    got = layer.attend(q.expand(B, 41, -1, -1), k, v)
    scores = (
        logits.transpose(1, 2)[:, :, None]
        .expand(-1, -1, 41, -1)
        .masked_fill(torch.ones(41, 41, dtype=torch.bool).triu(1), -math.inf)
    )
    torch.testing.assert_close(got, (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2))
    for gradient in torch.autograd.grad(got.square().sum(), (k, v)):
        assert gradient.isfinite().all()


def test_a_prefix_depends_on_nothing_behind_it():
    peak, sums = torch.randn(3, 11, 1, dtype=torch.float64), torch.rand(3, 11, 5, dtype=torch.float64)
    before = mean(*prefixes(peak, sums))
    peak[:, 6:], sums[:, 6:] = 9.0, 1.0
    assert mean(*prefixes(peak, sums))[:, :6].equal(before[:, :6])


def test_a_layer_is_softmax_s_and_one_vector_and_its_state_does_not_grow(make_layer):
    layer = make_layer(Aaren, dim=M).float()
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * M * M + M
    for length in (3, 37):
        assert layer.prefill(stream(length).float())[1].nbytes == B * layer.state_bytes(length) == B * H * 12 * 4


def test_causal_cross_attention_is_refused_with_the_reason():
    with pytest.raises(UnsupportedPattern, match="its query is learned and reads no stream"):
        Aaren(LayerSpec(dim=M, num_heads=H, causal=True, cross=True))
