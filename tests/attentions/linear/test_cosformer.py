"""cosFormer against its weights written on pairs of positions, before the cosine is taken apart."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.linear.cosformer import CosFormer

B, M, H = 2, 30, 6
SPAN = 2048  # LayerSpec's max_length


def naive(layer, x, source, causal, key_mask=None, span=SPAN):
    """o_i = sum_j A_ij v_j / sum_j A_ij, A_ij = relu(q_i).relu(k_j) cos(pi / 2 (i - j) / M), over the visible j."""
    width = M // H
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                q = (layer.q_proj.weight[own] @ x[b, i]).relu()
                total, norm = torch.zeros(width, dtype=x.dtype), torch.zeros((), dtype=x.dtype)
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask is None or key_mask[b, j]:
                        k = (layer.k_proj.weight[shared] @ source[b, j]).relu()
                        weight = (q @ k) * math.cos(math.pi / 2 * (i - j) / span)
                        total, norm = total + weight * (layer.v_proj.weight[shared] @ source[b, j]), norm + weight
                heads.append(total / norm if norm > 0 else total)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


def short(layer, span):
    """The layer for a slot of `span` positions, where the cosine bends within the test's lengths."""
    layer.span = span
    return layer


@pytest.mark.parametrize(("chunk_size", "num_kv_heads"), [(4, 2), (64, 6)])
def test_causal_self_attention_equals_the_weights_on_pairs(chunk_size, num_kv_heads, make_layer, agree):
    layer = short(make_layer(CosFormer, dim=M, num_kv_heads=num_kv_heads), 11)
    layer.chunk_size = chunk_size
    x = torch.randn(B, 11, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True, span=11), [x, *layer.parameters()])


def test_noncausal_self_attention_reads_every_unmasked_key(make_layer, agree):
    layer = short(make_layer(CosFormer, dim=M, causal=False), 11)
    x = torch.randn(B, 7, M, dtype=torch.float64)
    mask = torch.rand(B, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, False, mask, 11), [x, *layer.parameters()])


@pytest.mark.parametrize("lengths", [(5, 11), (11, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_counts_both_sequences_from_zero(causal, lengths, make_layer, agree):
    layer = short(make_layer(CosFormer, dim=M, causal=causal, cross=True), 11)
    x, context = (torch.randn(B, length, M, dtype=torch.float64) for length in lengths)
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, False, span=11), [x, context])


def test_decoding_over_a_context_moves_the_query_and_not_the_context(make_layer):
    layer = short(make_layer(CosFormer, dim=M, cross=True), 13)
    x, context = torch.randn(B, 11, M, dtype=torch.float64), torch.randn(B, 7, M, dtype=torch.float64)
    want = naive(layer, x, context, False, span=13)
    output, state = layer.prefill(x[:, :3], context)
    torch.testing.assert_close(output, want[:, :3], rtol=1e-9, atol=1e-9)
    for t in range(3, 11):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-9, atol=1e-9)
    assert (state.position, state.queries) == (7, 11)


def test_the_span_is_the_longest_length_of_the_slot_whatever_is_read():
    def span(**keywords):
        return CosFormer(LayerSpec(dim=M, num_heads=H, causal=True, **keywords)).span

    assert span(max_length=37) == 37
    assert span(max_length=37, cross=True) == 37
    assert span(max_length=37, cross=True, context_length=53) == 53
    assert span(max_length=37, cross=True, context_length=23) == 37


@pytest.mark.parametrize("cross", [False, True])
def test_a_position_beyond_the_span_is_refused(cross):
    spec = LayerSpec(dim=M, num_heads=H, causal=True, cross=cross, max_length=5)
    layer, x = CosFormer(spec), torch.randn(B, 6, M)
    context = [x[:, :5]] if cross else []
    with pytest.raises(ValueError, match=r"reach 5 positions, got a sequence of 6; .* max_length=6"):
        layer(x, *context)
    _, state = layer.prefill(x[:, :5], *context)
    with pytest.raises(ValueError, match="got a sequence of 6"):
        layer.step(x[:, 5:], state)


def test_features_hold_no_negative_number_and_a_query_that_meets_no_key_reads_zero(make_layer):
    layer = make_layer(CosFormer, dim=M)
    x = torch.randn(B, 5, M, dtype=torch.float64)
    assert layer.query(x).min() == 0 and layer.query(x).shape == (B, 5, H, 2 * 5)
    with torch.no_grad():
        layer.q_proj.weight.zero_()
    assert layer(x).eq(0).all()


def test_the_state_is_two_features_per_channel_times_values_and_normaliser(make_layer):
    state = make_layer(CosFormer, dim=M).float().init_state(B)
    assert state.nbytes == B * H * (2 * 5) * (5 + 1) * 4
