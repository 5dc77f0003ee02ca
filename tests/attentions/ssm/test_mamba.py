"""Mamba against its recurrence, channel by channel, and the scan against a loop."""

import pytest
import torch

from attentions.base import LayerSpec
from attentions.ssm._scan import selective_scan
from attentions.ssm.mamba import Mamba

B, T, S, M, N, CONV = 2, 7, 5, 17, 3, 4  # width 17: rank 2 of dt


def silu(x):
    return x / (1 + torch.exp(-x))


def recurrence(layer, xs, seen):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t over a list of inputs; (u_t, C_t, C_t h_t + D u_t) and the last h."""
    inner, rank = layer.ssm.D.shape[0], layer.ssm.dt_weight.shape[1]
    inputs = [s * (layer.in_proj.weight[:inner] @ x) for x, s in zip(xs, seen, strict=True)]
    h = torch.zeros(inner, N, dtype=torch.float64)
    outputs = []
    for t in range(len(inputs)):
        total = layer.conv.bias
        for i in range(CONV):
            if t + i - CONV + 1 >= 0:
                total = total + layer.conv.weight[:, i] * inputs[t + i - CONV + 1]
        u = silu(total)
        low, b, c = (layer.ssm.x_proj.weight @ u).split([rank, N, N])
        dt = torch.log1p(torch.exp(layer.ssm.dt_weight @ low + layer.ssm.dt_bias))
        if seen[t]:
            columns = []
            for n in range(N):
                columns.append(torch.exp(-dt * layer.ssm.A_log[:, n].exp()) * h[:, n] + dt * b[n] * u)
            h = torch.stack(columns, dim=1)
        outputs.append((u, c, h @ c + layer.ssm.D * u))
    return outputs, h


def naive(layer, x, causal=True, context=None, key_mask=None):
    inner = layer.ssm.D.shape[0]
    rows = []
    for b in range(B):
        source = x[b] if context is None else context[b]
        seen = [1.0 if key_mask is None or key_mask[b, s] else 0.0 for s in range(len(source))]
        if context is not None:
            _, h = recurrence(layer, list(source), seen)
            queries, _ = recurrence(layer, list(x[b]), [1.0] * T)
            ys = [h @ c + layer.ssm.D * u for u, c, _ in queries]
        else:
            ys = [y for _, _, y in recurrence(layer, list(source), seen)[0]]
            if not causal:
                back = [y for _, _, y in recurrence(layer, list(source)[::-1], seen[::-1])[0]][::-1]
                ys = [(one + other) / 2 for one, other in zip(ys, back, strict=True)]
        rows += [layer.out_proj.weight @ (ys[t] * silu(layer.in_proj.weight[inner:] @ x[b, t])) for t in range(T)]
    return torch.stack(rows).reshape(B, T, M)


@pytest.fixture
def make(make_layer):
    def make(**keywords):
        layer = make_layer(Mamba, dim=M, num_heads=1, state_dim=N, conv_size=CONV, **keywords)
        return layer, torch.randn(B, T, M, dtype=torch.float64)

    return make


@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_the_recurrence(causal, make, agree):
    layer, x = make(causal=causal)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [x, *layer.parameters()]
    for key_mask in (None, mask):
        agree(lambda m=key_mask: layer(x, key_mask=m), lambda m=key_mask: naive(layer, x, causal, None, m), inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_the_state_after_the_context(causal, make, agree):
    layer, x = make(causal=causal, cross=True)
    context = torch.randn(B, S, M, dtype=torch.float64)
    mask = torch.tensor([[True] * S, [True, False, True, True, False]])
    inputs = [x, context, *layer.parameters()]
    for m in (None, mask):
        agree(lambda m=m: layer(x, context, key_mask=m), lambda m=m: naive(layer, x, True, context, m), inputs)


@pytest.mark.parametrize("segment_size", [1, 5, 64, None])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_scan_equals_the_loop_in_outputs_last_state_and_gradients(length, segment_size, agree):
    torch.manual_seed(0)
    u, dt, b, c = (torch.randn(B, length, n, dtype=torch.float64) for n in (3, 3, 5, 5))
    dt, a = dt.abs(), -torch.rand(3, 5, dtype=torch.float64)

    def loop():
        h, ys = torch.zeros(B, 3, 5, dtype=torch.float64), []
        for t in range(length):
            h = (dt[:, t, :, None] * a).exp() * h + (dt * u)[:, t, :, None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return torch.cat([torch.stack(ys, dim=1).flatten(), h.flatten()])

    def fast():
        return torch.cat([part.flatten() for part in selective_scan(u, dt, a, b, c, segment_size=segment_size)])

    agree(fast, loop, [u, dt, b, c] if length == 1 else [u, dt, a, b, c])  # one position: nothing decays yet


def test_decays_of_any_strength_neither_overflow_nor_lose_gradients():
    u, b, c = (torch.randn(1, 300, n) for n in (2, 3, 3))
    dt = torch.tensor([0.0, 1e-4, 1.0, 1e4]).repeat(75)[None, :, None].expand(1, 300, 2).clone().requires_grad_()
    y, h = selective_scan(u, dt, -torch.ones(2, 3), b, c)
    (y.sum() + h.sum()).backward()
    assert y.isfinite().all() and h.isfinite().all() and dt.grad.isfinite().all()


def test_prefill_and_steps_equal_all_at_once(make):
    layer, x = make()
    want = layer(x)
    for prompt in (1, 3, T):  # shorter than the convolution, and longer
        output, state = layer.prefill(x[:, :prompt])
        torch.testing.assert_close(output, want[:, :prompt])
        for t in range(prompt, T):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.nbytes == 8 * B * 2 * M * (N + CONV - 1)


def test_defaults_and_initialisation_are_published():
    torch.manual_seed(0)
    layer = Mamba(LayerSpec(dim=64, num_heads=2, causal=True))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (256, 64),
        "conv.weight": (128, 4),
        "conv.bias": (128,),
        "ssm.x_proj.weight": (4 + 16 + 16, 128),
        "ssm.dt_weight": (128, 4),
        "ssm.dt_bias": (128,),
        "ssm.A_log": (128, 16),
        "ssm.D": (128,),
        "out_proj.weight": (64, 128),
    }
    torch.testing.assert_close(layer.ssm.A_log.exp(), torch.arange(1.0, 17).expand(128, -1))
    dt = torch.nn.functional.softplus(layer.ssm.dt_bias)
    assert 0.999e-3 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 0.101  # log-uniform: both ends are reached


def test_what_it_cannot_be_is_refused_with_the_way_out():
    spec = LayerSpec(dim=M, num_heads=1, causal=True)
    for keywords, words in (
        ({"state_dim": 0}, "state_dim must be at least 1, got 0"),
        ({"expand": 0.01}, "got 0.01 for dim=17"),
        ({"dt_min": 0.0}, "got dt_min=0.0 and dt_max=0.1"),
        ({"conv_size": 0}, "kernel_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Mamba(spec, **keywords)
    with pytest.raises(ValueError, match="decodes over a context"):
        Mamba(LayerSpec(dim=M, num_heads=1, causal=True, cross=True)).init_state(B)
