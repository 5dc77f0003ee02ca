"""TTT-Linear against gradient descent as written in Sun et al.: autograd on the inner loss, one position at a time."""

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec
from attentions.linear.ttt_linear import TTTLinear

B, M, H, D = 2, 42, 3, 14
MINI = 3


def rotated(vector, place):
    half = len(vector) // 2
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half), place * theta)
    return torch.cat([turned.real, turned.imag])


def learned(layer, source, visible, order, g):
    """W and b of one key-value head after each position of `order`, by autograd on |z + LN(z W + b) - v|^2 / 2."""
    rotates = layer.rotary_base is not None
    start, after, gradient = (layer.weights[g, :-1], layer.weights[g, -1]), {}, (0.0, 0.0)
    for i, t in enumerate(order):
        place = i % MINI
        if place == 0 and i:
            start, gradient = after[order[i - 1]], (0.0, 0.0)
        k = layer.k_proj.weight[g * D : (g + 1) * D] @ source[t]
        k = rotated(k, place) if rotates else k
        v = layer.v_proj.weight[g * D : (g + 1) * D] @ source[t]
        if visible[t]:
            fitted = F.layer_norm(k @ start[0] + start[1], (D,), layer.inner_weight[g], layer.inner_bias[g], 1e-6)
            loss = (k + fitted - v).square().sum() / 2
            eta = layer.base_lr / D * (layer.rate_weight[g] @ source[t] + layer.rate_bias[g]).sigmoid()
            new = torch.autograd.grad(loss, start, create_graph=True)
            gradient = tuple(old + eta * part for old, part in zip(gradient, new, strict=True))
        tau = (1 / (place + 1) + layer.tau_offset[place]).clamp_min(0)
        after[t] = tuple(weight - tau * part for weight, part in zip(start, gradient, strict=True))
    return after


def naive(layer, x, context=None, key_mask=None):
    """W_out LN(q + LN(q W + b)), W and b after the position, averaged over both ends, or after the context."""
    groups, rows = layer.spec.kv_heads, []
    for b in range(B):
        source = x[b] if context is None else context[b]
        visible = [True] * len(source) if key_mask is None else key_mask[b].tolist()
        orders = [range(len(source))]
        if context is None and not layer.spec.causal:
            orders.append(orders[0][::-1])
        runs = [[learned(layer, source, visible, order, g) for g in range(groups)] for order in orders]
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                g, total = h * groups // H, 0
                for order, run in zip(orders, runs, strict=True):
                    q = layer.q_proj.weight[h * D : (h + 1) * D] @ x[b, t]
                    q = rotated(q, order.index(t) % MINI) if layer.rotary_base is not None else q
                    w, shift = run[g][t if context is None else len(source) - 1]
                    total = (
                        total + q + F.layer_norm(q @ w + shift, (D,), layer.inner_weight[g], layer.inner_bias[g], 1e-6)
                    )
                heads.append(total / len(runs))
            normed = F.layer_norm(torch.cat(heads), (M,), layer.norm.weight, layer.norm.bias, 1e-6)
            rows.append(layer.out_proj.weight @ normed)
    return torch.stack(rows).reshape(x.shape)


def stream(length, seed=2):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(length):
    return torch.rand(B, length, generator=torch.Generator().manual_seed(1)) > 0.3


@pytest.fixture
def make(make_layer):
    def layer(**keywords):
        made = make_layer(TTTLinear, dim=M, num_heads=H, mini_batch=MINI, base_lr=3.0, **keywords)
        with torch.no_grad():
            made.tau_offset.mul_(0.5)  # at full size some steps would be clamped to zero
        return made

    return layer


@pytest.mark.parametrize("num_kv_heads", [3, 1])
def test_the_dual_form_equals_gradient_descent_on_the_inner_loss(num_kv_heads, make, agree):
    layer, x = make(num_kv_heads=num_kv_heads), stream(7)  # two mini-batches of three and a ragged one
    # rotation angles are float32 by design
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_masked_positions_teach_nothing(causal, make, agree):
    layer, x, mask = make(causal=causal), stream(8), visible(8)

    def want():
        return naive(layer, x, key_mask=mask)

    agree(lambda: layer(x, key_mask=mask), want, [x, *layer.parameters()], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_what_was_learned_from_the_context(causal, make, agree):
    layer, x, context, mask = make(causal=causal, cross=True, num_kv_heads=1), stream(3), stream(8, 3), visible(8)
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), inputs)


def test_without_rotation_the_agreement_is_exact(make, agree):
    layer, x = make(), stream(7)
    layer.rotary_base = None
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("first", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("second", [1, 3, 7])
def test_a_state_can_be_written_in_pieces_of_any_length(first, second, make):
    layer, x = make(), stream(23)
    want = layer.prefill(x[:, : first + second])[1]
    _, state = layer.prefill(x[:, :first])
    rest = x[:, first : first + second]
    state = layer.update(state, *layer.key_value(rest, first), **layer.terms(rest))
    for name in ("weights", "gradient"):
        torch.testing.assert_close(getattr(state, name), getattr(want, name), rtol=1e-9, atol=1e-10)


def test_a_mini_batch_of_one_is_online_gradient_descent(make_layer):
    """With m = 1 and tau = 1 each position steps from where the one before stopped."""
    layer = make_layer(TTTLinear, dim=M, num_heads=H, mini_batch=1)
    with torch.no_grad():
        layer.tau_offset.zero_()
    x = stream(2)
    _, state = layer.prefill(x)
    w = layer.weights[0].detach()
    for t in range(2):
        w = w.requires_grad_()
        k, v = (proj(x[0, t])[:D] for proj in (layer.k_proj, layer.v_proj))
        z = F.layer_norm(k @ w[:-1] + w[-1], (D,), layer.inner_weight[0], layer.inner_bias[0], 1e-6)
        eta = (layer.rate_weight[0] @ x[0, t] + layer.rate_bias[0]).sigmoid() / D
        (gradient,) = torch.autograd.grad((k + z - v).square().sum() / 2, w)
        w = (w - eta * gradient).detach()
    torch.testing.assert_close(state.weights[0, 0], w, rtol=1e-8, atol=1e-9)


def test_it_starts_as_published():
    torch.manual_seed(0)
    layer = TTTLinear(LayerSpec(dim=64, num_heads=2, causal=True))
    assert layer.mini_batch == 16 and abs(layer.weights[:, :-1].std() - 0.02) < 0.002
    assert layer.weights[:, -1].eq(0).all() and layer.tau_offset.eq(0).all() and layer.rate_bias.eq(0).all()
    small = 2 * (64 + 1) + 2 * 32 + 16 + 2 * 64 + 2 * 64  # learning rate, b, tau, inner norm, norm
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 64**2 + 64 * 32 + small


def test_bad_values_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="mini_batch must be at least 1, got 0"):
        TTTLinear(LayerSpec(dim=32, num_heads=2, causal=True), mini_batch=0)
    with pytest.raises(ValueError, match="got 15; nearest: 14, 16, or rotary_base=null"):
        TTTLinear(LayerSpec(dim=90, num_heads=6, causal=True))
