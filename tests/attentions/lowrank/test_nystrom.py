"""Nystromformer against loops over segments, landmarks and iterations."""

import math

import pytest
import torch

from attentions.base import UnsupportedPattern
from attentions.dense.softmax import Softmax
from attentions.lowrank.nystrom import Nystrom, pseudo_inverse

B, T, S, M, H = 2, 13, 17, 60, 6


def softmax_rows(a, b):
    scores = torch.exp(a @ b.T / math.sqrt(a.shape[-1]))
    return scores / scores.sum(-1, keepdim=True)


def segment_means(rows, num_landmarks):
    """Of n rows, min(num_landmarks, n) means; segment s ends where (s + 1) n / m is reached."""
    n, m = len(rows), min(num_landmarks, len(rows))
    ends = [math.ceil(s * n / m) for s in range(m + 1)]
    return torch.stack([rows[ends[s] : ends[s + 1]].mean(0) for s in range(m)])


def inverse_by_iteration(a, num_iterations):
    z = a.T / (torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(a, math.inf))
    eye = torch.eye(len(a), dtype=a.dtype)
    for _ in range(num_iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - 15 * az + 7 * az @ az - az @ az @ az)
    return z


def naive(layer, x, source, key_mask=None):
    width, cross, groups = M // H, layer.spec.cross, layer.spec.kv_heads
    q, k, v = x @ layer.q_proj.weight.T, source @ layer.k_proj.weight.T, source @ layer.v_proj.weight.T
    outputs = []
    for b in range(B):
        seen = [j for j in range(source.shape[1]) if key_mask is None or key_mask[b, j]]
        heads = []
        for h in range(H):
            g = h * groups // H
            own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
            queries, keys, values = q[b, :, own], k[b, seen, shared], v[b, seen, shared]
            q_marks = segment_means(queries if cross else queries[seen], layer.num_landmarks)
            k_marks = segment_means(keys, layer.num_landmarks)
            inverse = inverse_by_iteration(softmax_rows(q_marks, k_marks), layer.num_iterations)
            read = softmax_rows(queries, k_marks) @ inverse @ softmax_rows(q_marks, keys) @ values
            if layer.kernel is not None:
                reach = layer.kernel.shape[1] // 2
                near = [[j for j in seen if abs(j - i) <= reach] for i in range(len(queries))]
                read = read + torch.stack(
                    [
                        sum((layer.kernel[g, j - i + reach] * v[b, j, shared] for j in js), torch.zeros(width).to(v))
                        for i, js in enumerate(near)
                    ]
                )
            heads.append(read)
        outputs.append(torch.cat(heads, dim=-1))
    return torch.stack(outputs) @ layer.out_proj.weight.T


def mask_of(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1] = torch.arange(length) < 4  # fewer positions than landmarks
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("conv_kernel", "num_kv_heads"), [(None, 6), (5, 6), (5, 2)])
def test_self_attention_equals_the_product_of_three_kernels(conv_kernel, num_kv_heads, masked, make_layer, agree):
    layer = make_layer(Nystrom, num_landmarks=5, conv_kernel=conv_kernel, causal=False, num_kv_heads=num_kv_heads)
    x, mask = torch.randn(B, T, M, dtype=torch.float64), mask_of(T) if masked else None
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize(("num_queries", "masked"), [(7, False), (7, True), (3, True)])
def test_cross_attention_has_landmarks_of_both_sequences(num_queries, masked, make_layer, agree):
    layer = make_layer(Nystrom, num_landmarks=5, causal=False, cross=True)
    x, context = torch.randn(B, num_queries, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    mask = mask_of(S) if masked else None
    agree(
        lambda: layer(x, context, key_mask=mask),
        lambda: naive(layer, x, context, mask),
        [x, context, *layer.parameters()],
    )


@pytest.mark.parametrize("shape", [(5, 5), (3, 5), (5, 3)])
def test_enough_iterations_give_the_pseudo_inverse(shape):
    a = torch.zeros(2, 7, 7, dtype=torch.float64)
    a[:, : shape[0], : shape[1]] = torch.randn(2, *shape, dtype=torch.float64).softmax(-1)  # the rest stays zero
    torch.testing.assert_close(pseudo_inverse(a, 30), torch.linalg.pinv(a), rtol=1e-7, atol=1e-7)


def test_a_landmark_per_position_is_softmax_attention_up_to_the_iterations(make_layer):
    layers = [make_layer(Nystrom, num_landmarks=13, num_iterations=n, conv_kernel=None, causal=False) for n in (6, 40)]
    softmax, x = make_layer(Softmax, causal=False), torch.randn(B, T + 1, M, dtype=torch.float64)
    softmax.load_state_dict(layers[0].state_dict())
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[:, 4] = False  # 13 of 14 positions are left: the product is taken, and its landmarks are the positions
    kept = mask[0]
    want = softmax(x, key_mask=mask)[:, kept]
    few, many = ((layer(x, key_mask=mask)[:, kept] - want).abs().max() for layer in layers)
    assert many < 1e-6 < few
    torch.testing.assert_close(layers[0](x[:, kept]), want)  # without padding it is computed as such


def test_padding_does_not_move_the_segments(make_layer):
    layer, x = make_layer(Nystrom, num_landmarks=5, causal=False), torch.randn(B, T, M, dtype=torch.float64)
    padded, mask = torch.randn(B, T + 8, M, dtype=torch.float64), torch.zeros(B, T + 8, dtype=torch.bool)
    padded[:, 3 : 3 + T], mask[:, 3 : 3 + T] = x, True
    torch.testing.assert_close(layer(padded, key_mask=mask)[:, 3 : 3 + T], layer(x))


def test_the_convolution_costs_one_kernel_per_head(make_layer):
    layer = make_layer(Nystrom, causal=False)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * M * M + H * 33
    assert make_layer(Nystrom, causal=False, cross=True).kernel is None


def test_mistakes_and_causal_slots_are_named(make_layer):
    with pytest.raises(ValueError, match="num_landmarks must be at least 1, got 0"):
        make_layer(Nystrom, num_landmarks=0, causal=False)
    with pytest.raises(ValueError, match="conv_kernel must be odd, got 4; nearest: 5"):
        make_layer(Nystrom, conv_kernel=4, causal=False)
    for cross in (False, True):
        with pytest.raises(UnsupportedPattern, match="later ones too"):
            make_layer(Nystrom, cross=cross)
