"""RWKV-7 against the time mixing of Peng et al., token shift, bonus, norm and gate included."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.linear.rwkv7 import RWKV7

B, M, H = 2, 42, 6
D = M // H


def shifted(stream, order):
    """x_{t-1} in the direction of `order`, for [T, M]."""
    return {t: stream[order[i - 1]] if i else torch.zeros_like(stream[t]) for i, t in enumerate(order)}


def mixed(layer, stream, before, t, index):
    return stream[t] + layer.mix[index] * (before[t] - stream[t])


def states(layer, source, visible, order):
    """S [K, V] per head after each position of `order`, and its k and v."""
    source = source * visible[:, None]
    before = shifted(source, order)
    state = [torch.zeros(D, D, dtype=source.dtype) for _ in range(H)]
    after = {}
    for t in order:
        low = torch.tanh(mixed(layer, source, before, t, 2) @ layer.decay_down) @ layer.decay_up
        w = torch.exp(-math.exp(-0.5) * (layer.decay_bias + low).sigmoid())
        k = layer.k_proj.weight @ mixed(layer, source, before, t, 3)
        v = layer.v_proj.weight @ mixed(layer, source, before, t, 4)
        a = (layer.rate_bias + mixed(layer, source, before, t, 5) @ layer.rate_down @ layer.rate_up).sigmoid()
        kappa, k = layer.removal * k, k * (1 + layer.replacement * (a - 1))
        keys, values = k.split(D), v.split(D)
        for h in range(H):
            channels = slice(h * D, (h + 1) * D)
            unit = kappa[channels] / kappa[channels].norm()
            if visible[t]:
                erase = torch.diag(w[channels]) - torch.outer(a[channels] * unit, unit)
                state[h] = erase @ state[h] + torch.outer(keys[h], values[h])
        after[t] = list(state), keys, values
    return after


def naive(layer, x, context=None, key_mask=None):
    """W (g * (norm(S^T r) + (r . rho k) v)), with S after t, from both ends or after the context."""
    rows = []
    for b in range(B):
        source = x[b] if context is None else context[b]
        visible = torch.ones(len(source)).to(x) if key_mask is None else key_mask[b].to(x)
        stream = x[b] * visible[:, None] if context is None else x[b]
        orders = [range(len(source))]
        if context is None and not layer.spec.causal:
            orders.append(orders[0][::-1])
        runs = [states(layer, source, visible, order) for order in orders]
        befores = [shifted(stream, order if context is None else range(len(stream))) for order in orders]
        for t in range(len(stream)):
            total = 0
            for after, before in zip(runs, befores, strict=True):
                r = layer.r_proj.weight @ mixed(layer, stream, before, t, 0)
                gate = (mixed(layer, stream, before, t, 1) @ layer.gate_down).sigmoid() @ layer.gate_up
                state, keys, values = after[t if context is None else len(source) - 1]
                heads = []
                for h in range(H):
                    o = state[h].T @ r[h * D : (h + 1) * D]
                    o = (o - o.mean()) / (o.var(unbiased=False) + 1e-5 * D).sqrt()
                    o = o * layer.norm_weight[h * D : (h + 1) * D] + layer.norm_bias[h * D : (h + 1) * D]
                    if context is None:
                        o = o + (r[h * D : (h + 1) * D] * layer.bonus[h] * keys[h]).sum() * values[h]
                    heads.append(o)
                total = total + layer.out_proj.weight @ (gate * torch.cat(heads)) / len(runs)
            rows.append(total)
    return torch.stack(rows).reshape(x.shape)


def stream(length, seed=2):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def make(make_layer):
    return lambda **keywords: make_layer(RWKV7, dim=M, decay_rank=3, rate_rank=5, gate_rank=11, **keywords)


def test_layer_equals_the_paper_s_recurrence(make, agree):
    layer, x = make(), stream(19)
    layer.chunk_size = 8
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_a_masked_position_neither_writes_nor_decays_nor_reaches_the_shift(causal, make):
    layer, x = make(causal=causal), stream(17)
    mask = torch.tensor([[True] * 5 + [False] * 4 + [True] * 8, [False] * 3 + [True, False, True] * 4 + [False] * 2])
    got, want = layer(x, key_mask=mask), naive(layer, x, key_mask=mask)
    # a masked position behind another has k = 0, whose direction the loop does not define
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-8, atol=1e-9)


def test_noncausal_self_attention_averages_the_runs_from_both_ends(make, agree):
    layer, x = make(causal=False), stream(17)
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_the_state_after_the_context(causal, make, agree):
    layer, x, context = make(causal=causal, cross=True), stream(7), stream(19, 3)
    agree(lambda: layer(x, context), lambda: naive(layer, x, context), [x, context, *layer.parameters()])


def test_padding_on_the_left_changes_nothing(make):
    layer, x, mask = make(), stream(37), torch.arange(37).expand(B, -1) >= 9
    torch.testing.assert_close(layer(x, key_mask=mask)[:, 9:], layer(x[:, 9:]), rtol=1e-9, atol=1e-10)


def test_it_starts_as_published():
    first, last = (RWKV7(LayerSpec(dim=64, num_heads=4, causal=True, layer=layer, num_layers=3)) for layer in (0, 2))
    assert first.mix[:, 0].eq(1).all() and torch.allclose(first.mix[3, 32], torch.tensor(1 - 0.5**0.7))
    assert torch.allclose(last.mix[3, 32], torch.tensor(1 - 0.5 ** (0.7 / 3)))
    # fastest and slowest channel of the first head: zigzag is -1 and 1 there
    assert torch.allclose(first.decay_bias[[0, 15]], torch.tensor([-8.0, -5.5 + 6 * 15 / 63 + 2.5]))
    assert torch.allclose(last.decay_bias[15], torch.tensor(-5.5 + 6 * (15 / 63) ** 2 + 2.5))
    assert first.decay_down.eq(0).all() and first.bonus.eq(-0.04).all()
    assert torch.allclose(first.norm_weight, torch.tensor((1 / 3) ** 0.7)) and last.norm_weight.eq(1).all()
    # a tenth of an orthogonal matrix; the gate has more rows than columns, hence sqrt(2) times that
    assert torch.allclose(first.decay_up @ first.decay_up.T, 0.01 * torch.eye(64), atol=1e-6)
    assert torch.allclose(first.gate_up.T @ first.gate_up, 0.02 * torch.eye(64), atol=1e-6)


def test_it_has_four_m_squared_and_low_ranks():
    layer = RWKV7(LayerSpec(dim=32, num_heads=2, causal=True), decay_rank=4, rate_rank=4, gate_rank=8)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 32**2 + 2 * 32 * 16 + 13 * 32


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="gate_rank must be at least 1, got 0"):
        RWKV7(LayerSpec(dim=32, num_heads=2, causal=True), gate_rank=0)
