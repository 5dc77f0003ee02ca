"""Performer against the sum over its random features, written out; its rows, redraws and stabiliser."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from attentions.linear.performer import Performer, orthogonal_gaussian

B, M, H = 2, 30, 6


def naive(layer, x, source, causal, key_mask=None):
    """o_i = sum_j A_ij v_j / sum_j A_ij, A_ij = mean over w of exp(w.q' - |q'|^2 / 2) exp(w.k' - |k'|^2 / 2)."""
    width = M // H
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                q = layer.q_proj.weight[own] @ x[b, i] / width**0.25
                keys = [j for j in range(i + 1 if causal else source.shape[1]) if key_mask is None or key_mask[b, j]]
                logs = []
                for j in keys:
                    k = layer.k_proj.weight[shared] @ source[b, j] / width**0.25
                    exponents = layer.projection @ q - q @ q / 2 + layer.projection @ k - k @ k / 2
                    logs.append(exponents.logsumexp(0) - math.log(len(exponents)))
                weights = torch.stack(logs).softmax(0)  # of their logarithms: A_ij / sum_j A_ij without overflow
                heads.append(weights @ (source[b, keys] @ layer.v_proj.weight[shared].T))
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize(("chunk_size", "num_kv_heads"), [(4, 2), (64, 6)])
def test_causal_self_attention_equals_the_sum_over_features(chunk_size, num_kv_heads, make_layer, agree):
    layer = make_layer(Performer, dim=M, num_features=7, num_kv_heads=num_kv_heads).eval()
    layer.chunk_size = chunk_size
    x = torch.randn(B, 9, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, causal=True), [x, *layer.parameters()])


def test_noncausal_self_attention_reads_every_unmasked_key(make_layer, agree):
    layer = make_layer(Performer, dim=M, num_features=7, causal=False).eval()
    x = torch.randn(B, 7, M, dtype=torch.float64) / 2
    mask = torch.rand(B, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, False, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_the_whole_context(causal, make_layer, agree):
    layer = make_layer(Performer, dim=M, num_features=7, causal=causal, cross=True).eval()
    x, context = torch.randn(B, 5, M, dtype=torch.float64) / 2, torch.randn(B, 11, M, dtype=torch.float64) / 2
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, causal=False), [x, context, *layer.parameters()])


@pytest.mark.parametrize("loud", [3, 8])
def test_a_loud_key_moves_no_output_before_it_and_leaves_the_rest_exact(loud, make_layer):
    """exp(w.k' - |k'|^2 / 2) is 1e-35 for this key: in units of the sequence's maximum or of its own, others vanish."""
    layer = make_layer(Performer, dim=M, num_features=7).eval()
    layer.chunk_size = 4
    x = torch.randn(B, 13, M, dtype=torch.float64) / 2
    x[:, loud] *= 8
    x[:, :2] *= 6  # a quiet start follows: the maximum rises by many orders
    with torch.no_grad():
        want = naive(layer, x, x, causal=True)
        torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-9)
        state = layer.init_state(B)
        for t in range(13):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-9, atol=1e-9)
        single = layer.float()(x.float()).double()
    assert (single - want).abs().max() < 1e-4 * want.abs().max()  # float32, exponents of some 100


def test_masked_keys_behind_and_ahead_do_not_touch_the_scale(make_layer):
    layer = make_layer(Performer, dim=M, num_features=7).float().eval()
    x = torch.randn(B, 13, M)
    mask = (torch.arange(13) % 4 > 0).expand(B, -1)
    want = layer(x, key_mask=mask)[:, mask[0]]
    torch.testing.assert_close(layer(x[:, mask[0]]), want, rtol=1e-5, atol=1e-6)
    loud = torch.where(mask[..., None], x, 1e3 * x)
    torch.testing.assert_close(layer(loud, key_mask=mask)[:, mask[0]], want, rtol=0, atol=0)


def test_many_features_approach_softmax_attention(make_layer):
    layer = make_layer(Performer, num_features=20000).eval()
    q, k, v = torch.randn(3, 1, 17, H, 10, dtype=torch.float64) / 2
    want = F.scaled_dot_product_attention(*(heads.transpose(1, 2) for heads in (q, k, v)), is_causal=True)
    # a weight's relative error is about exp(|q' + k'|^2 / 2) / sqrt(m), 2 / 140 here
    torch.testing.assert_close(layer.attend(q, k, v), want.transpose(1, 2), rtol=0, atol=0.03)


def test_rows_are_orthogonal_within_a_block_and_as_long_as_gaussian_vectors():
    torch.manual_seed(0)
    rows = torch.stack([orthogonal_gaussian(7, 5).double() for _ in range(1500)])
    unit = rows / rows.norm(dim=-1, keepdim=True)
    inner = unit @ unit.mT
    torch.testing.assert_close(inner[:, :5, :5], torch.eye(5).expand(1500, 5, 5).double(), rtol=0, atol=1e-5)
    assert inner[:, :5, 5:].abs().max() > 0.9  # the next block is independent
    # mean, covariance and squared length of N(0, 1) vectors; 5 standard errors
    assert rows.mean(0).abs().max() < 5 / 1500**0.5
    for row in range(7):
        assert (rows[:, row].T @ rows[:, row] / 1500 - torch.eye(5)).abs().max() < 5 * (2 / 1500) ** 0.5
    squared = rows.square().sum(-1)
    assert abs(float(squared.var() / 10) - 1) < 0.1  # chi-squared with 5 degrees: 2 * 5; equal lengths would give 0
    assert abs(float(torch.corrcoef(squared[:, :2].T)[0, 1])) < 5 / 1500**0.5


def test_rows_are_redrawn_every_so_many_training_forwards(make_layer):
    layer = make_layer(Performer, dim=M, redraw_every=3)
    x, drawn = torch.randn(B, 5, M, dtype=torch.float64), []
    torch.manual_seed(1)
    for _ in range(7):
        layer(x)
        drawn.append(layer.state_dict()["projection"].clone())
    changed = [not a.equal(b) for a, b in itertools.pairwise(drawn)]
    assert changed == [False, True, False, False, True, False]
    assert int(layer.state_dict()["forwards"]) == 7
    again = make_layer(Performer, dim=M, redraw_every=3)
    torch.manual_seed(1)
    for _ in range(7):
        again(x)
    assert again.projection.equal(layer.projection)
    layer.eval()(x)
    assert again.projection.equal(layer.projection) and int(layer.forwards) == 7


def test_rows_stay_when_they_are_never_redrawn(make_layer):
    layer = make_layer(Performer, dim=M, redraw_every=0)
    before = layer.projection.clone()
    layer(torch.randn(B, 5, M, dtype=torch.float64))
    assert layer.projection.equal(before)


def test_two_forwards_before_one_backward_each_keep_their_rows(make_layer):
    layer = make_layer(Performer, dim=M, redraw_every=1)
    x = torch.randn(B, 5, M, dtype=torch.float64)
    (layer(x) + layer(x)).sum().backward()
    assert layer.q_proj.weight.grad.isfinite().all()


def test_the_number_of_features_is_d_ln_d_unless_given(make_layer):
    assert make_layer(Performer, dim=96).num_features == 44  # heads of width 16
    assert make_layer(Performer, dim=384).num_features == 266  # of width 64: the paper's 256
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        make_layer(Performer, num_features=0)
    with pytest.raises(ValueError, match="redraw_every must be at least 0"):
        make_layer(Performer, dim=M, redraw_every=-1)
