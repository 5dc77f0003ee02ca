"""ABC against the memory of Peng et al. built anew for every prefix, slot by slot."""

import math

import pytest
import torch

from attentions.lowrank.abc import ABC

B, M, H, N = 2, 20, 4, 3


def naive(layer, x, source, causal, key_mask=None):
    """softmax(q K~^T / sqrt(K)) V~, slot c = sum_j alpha_jc k_j / sum_j alpha_jc, alpha = exp(W_phi x), visible j."""
    width = M // H
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                control = layer.control_proj.weight[g * N : (g + 1) * N]
                q = layer.q_proj.weight[own] @ x[b, i]
                keys = [j for j in range(i + 1 if causal else source.shape[1]) if key_mask is None or key_mask[b, j]]
                if not keys:
                    heads.append(0 * q)
                    continue
                slot_keys, slot_values = [], []
                for c in range(N):
                    alpha = torch.stack([(control[c] @ source[b, j]).exp() for j in keys])
                    share = alpha / alpha.sum()
                    slot_keys.append(share @ (source[b, keys] @ layer.k_proj.weight[shared].T))
                    slot_values.append(share @ (source[b, keys] @ layer.v_proj.weight[shared].T))
                weights = torch.stack([q @ k / math.sqrt(width) for k in slot_keys]).exp()
                heads.append(weights @ torch.stack(slot_values) / weights.sum())
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize(("chunk_size", "num_kv_heads"), [(4, 2), (64, 4)])
def test_causal_self_attention_reads_the_memory_of_each_prefix(chunk_size, num_kv_heads, make_layer, agree):
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=N, num_kv_heads=num_kv_heads)
    layer.chunk_size = chunk_size
    x = torch.randn(B, 9, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, causal=True), [x, *layer.parameters()])


def test_masked_positions_are_not_written_even_before_the_first_that_is(make_layer, agree):
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=N)
    layer.chunk_size = 4
    x = torch.randn(B, 11, M, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]]).bool()
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, True, mask), [x, *layer.parameters()])
    assert layer(x, key_mask=mask)[0, :5].eq(0).all()  # nothing to read


def test_noncausal_self_attention_reads_every_unmasked_key(make_layer, agree):
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=N, causal=False, num_kv_heads=2)
    x = torch.randn(B, 7, M, dtype=torch.float64)
    mask = torch.rand(B, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, False, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_the_whole_context(causal, make_layer, agree):
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=N, causal=causal, cross=True)
    x, context = torch.randn(B, 5, M, dtype=torch.float64), torch.randn(B, 11, M, dtype=torch.float64)
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, causal=False), [x, context, *layer.parameters()])


def test_a_step_at_a_time_equals_the_memory_of_each_prefix(make_layer):
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=N, num_kv_heads=2)
    x = torch.randn(B, 11, M, dtype=torch.float64)
    want = naive(layer, x, x, causal=True)
    output, state = layer.prefill(x[:, :3])
    torch.testing.assert_close(output, want[:, :3], rtol=1e-9, atol=1e-9)
    for t in range(3, 11):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-9, atol=1e-9)
    assert state.position == 11


def test_earlier_values_reach_later_outputs_as_far_as_controls_are_equal(make_layer):
    """With W_phi = 0 every slot is the mean of the prefix: CAB's causal form, without the sum, gives v_t / t."""
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=N)
    with torch.no_grad():
        layer.control_proj.weight.zero_()
        layer.out_proj.weight.copy_(torch.eye(M))
    x = torch.randn(B, 37, M, dtype=torch.float64)
    mean = layer.v_proj(x).cumsum(1) / torch.arange(1, 38)[:, None]
    torch.testing.assert_close(layer(x), mean, rtol=1e-9, atol=1e-9)


def test_sharp_controls_leave_one_position_in_each_slot(make_layer):
    """With one slot per position it is softmax attention over those positions."""
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=7, causal=False)
    q, k, v = torch.randn(3, B, 7, H, 5, dtype=torch.float64)
    control = (1e3 * torch.eye(7, dtype=torch.float64))[:, None].expand(B, 7, H, 7)  # [B, S, G, n]
    want = torch.nn.functional.scaled_dot_product_attention(*(heads.transpose(1, 2) for heads in (q, k, v)))
    torch.testing.assert_close(layer.attend(q, k, v, control=control), want.transpose(1, 2), rtol=1e-9, atol=1e-9)


def test_controls_that_rise_and_fall_by_hundreds_stay_exact_in_float32(make_layer):
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=N)
    layer.chunk_size = 4
    q, k, v = torch.randn(3, B, 13, H, 5, dtype=torch.float64)
    control = 300 * torch.randn(B, 13, H, N, dtype=torch.float64)
    single = [x.float().requires_grad_() for x in (q, k, v, control)]
    got = layer.attend(*single[:3], control=single[3])
    want = layer.attend(q, k, v, control=single[3].double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)  # float32 rounds controls of 1000 at 6e-5
    got.sum().backward()  # also through what is padded behind the end, where a wrong scale would overflow
    assert all(x.grad.isfinite().all() for x in single)


def test_dropout_takes_whole_slots_from_a_query(make_layer):
    layer = make_layer(ABC, dim=M, num_heads=H, num_slots=1, dropout=0.5)
    x = torch.randn(B, 7, M, dtype=torch.float64)
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(M))
    want, got = (heads.unflatten(-1, (H, -1)) for heads in (layer.eval()(x), layer.train()(x)))
    kept = got.abs().amax(-1) > 0
    assert kept.any() and not kept.all()
    torch.testing.assert_close(got[kept], 2 * want[kept])


def test_the_state_is_a_key_a_value_a_weight_and_a_peak_per_slot(make_layer):
    layer = make_layer(ABC, dim=M, num_heads=H, num_kv_heads=2).float()
    state = layer.prefill(torch.randn(B, 37, M))[1]
    assert state.nbytes == layer.init_state(B).nbytes == B * 2 * 16 * (5 + 5 + 1 + 1) * 4


def test_no_slot_is_refused(make_layer):
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        make_layer(ABC, num_slots=0)
