"""S4D against its kernel summed term by term, its recurrence, and the matrices behind its initialisations."""

import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.ssm._fft import long_conv
from attentions.ssm.s4d import S4D

B, T, M, N = 2, 7, 5, 6


def kernel(ssm, direction, channel, distance):
    """K_l = 2 Re sum_n C_n (exp(dt A_n (l + 1)) - exp(dt A_n l)) / A_n, in real arithmetic."""
    dt, a, w = ssm.log_dt[channel].exp(), -ssm.log_decay[channel].exp(), ssm.frequency[channel]
    real, imag = 0.0, 0.0
    for sign, at in ((1, dt * (distance + 1)), (-1, dt * distance)):
        real = real + sign * (a * at).exp() * (w * at).cos()
        imag = imag + sign * (a * at).exp() * (w * at).sin()
    size = a * a + w * w
    quotient = (real * a + imag * w) / size, (imag * a - real * w) / size
    c = ssm.C[direction, channel]
    return 2 * (c[:, 0] * quotient[0] - c[:, 1] * quotient[1]).sum()


def naive(layer, x, causal, key_mask=None):
    """GLU(W GELU(K * u + D u) + b), with a second kernel on what comes after the own position when noncausal."""
    rows = []
    taps = [[[kernel(layer.ssm, d, c, j) for j in range(T)] for c in range(M)] for d in range(1 if causal else 2)]
    for b in range(B):
        seen = [x[b, s] * (1.0 if key_mask is None or key_mask[b, s] else 0.0) for s in range(T)]
        for t in range(T):
            channels = []
            for c in range(M):
                y = layer.ssm.D[c] * seen[t][c]
                for s in range(T):
                    if s <= t:
                        y = y + taps[0][c][t - s] * seen[s][c]
                    elif not causal:
                        y = y + taps[1][c][s - t - 1] * seen[s][c]
                channels.append(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))
            out = layer.out_proj.weight @ torch.stack(channels) + layer.out_proj.bias
            rows.append(out[:M] * out[M:].sigmoid())
    return torch.stack(rows).reshape(B, T, M)


@pytest.fixture
def layer_and_input(make_layer):
    def make(causal=True, init="lin"):
        layer = make_layer(S4D, dim=M, num_heads=1, causal=causal, state_dim=N, init=init)
        return layer, torch.randn(B, T, M, dtype=torch.float64)

    return make


@pytest.mark.parametrize("causal", [True, False])
def test_layer_equals_the_kernel_summed_term_by_term(causal, layer_and_input, agree):
    layer, x = layer_and_input(causal)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    for key_mask in (None, mask):
        agree(
            lambda m=key_mask: layer(x, key_mask=m),
            lambda m=key_mask: naive(layer, x, causal, m),
            [x, *layer.parameters()],
        )


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_prefill_and_steps_equal_all_at_once(init, layer_and_input):
    layer, x = layer_and_input(init=init)
    want = layer(x)
    for prompt in (1, 5, T):
        output, state = layer.prefill(x[:, :prompt])
        torch.testing.assert_close(output, want[:, :prompt])
        for t in range(prompt, T):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.position == T and state.nbytes == B * M * N * 8  # float64: N real numbers per channel


def test_the_state_is_the_recurrence_x_t_is_exp_dt_a_x_plus_u(layer_and_input):
    layer, x = layer_and_input()
    _, state = layer.prefill(x)
    a = torch.complex(-layer.ssm.log_decay.exp(), layer.ssm.frequency)
    memory = torch.zeros(B, M, N // 2, dtype=torch.complex128)
    for t in range(T):
        memory = (layer.ssm.log_dt.exp()[:, None] * a).exp() * memory + x[:, t, :, None]
    torch.testing.assert_close(state.memory, memory)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 2), (13, 13), (13, 5), (64, 64)])
def test_long_convolution_equals_the_matrix_of_distances(length, taps):
    u, forward, backward = torch.randn(2, length, 3, 5), torch.randn(3, 1, taps), torch.randn(3, 5, taps)
    u, forward, backward = u.double(), forward.double(), backward.double()
    ahead = torch.zeros(3, 5, length, length, dtype=torch.float64)
    behind = torch.zeros_like(ahead)
    for t in range(length):
        for s in range(length):
            if 0 <= t - s < taps:
                behind[..., t, s] = forward[..., t - s]
            if 0 <= s - t - 1 < taps:
                ahead[..., t, s] = backward[..., s - t - 1]
    torch.testing.assert_close(long_conv(u, forward), torch.einsum("hdts,bshd->bthd", behind, u))
    torch.testing.assert_close(long_conv(u, forward, backward), torch.einsum("hdts,bshd->bthd", behind + ahead, u))


def test_initial_frequencies_are_those_of_the_paper():
    def frequencies(init):
        return S4D(LayerSpec(dim=M, num_heads=1, causal=True), state_dim=N, init=init).ssm.frequency

    torch.testing.assert_close(frequencies("lin"), torch.tensor([[0.0, math.pi, 2 * math.pi]] * M))
    inverse = [6 / math.pi * (6 / 1 - 1), 6 / math.pi * (6 / 3 - 1), 6 / math.pi * (6 / 5 - 1)]
    torch.testing.assert_close(frequencies("inv"), torch.tensor([inverse] * M))
    hippo = torch.zeros(N, N, dtype=torch.float64)
    for n in range(N):
        for k in range(n):
            hippo[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1))
        hippo[n, n] = -(n + 1)
    root = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
    eigenvalues = torch.linalg.eigvals(hippo + torch.outer(root, root))
    torch.testing.assert_close(eigenvalues.real, torch.full((N,), -0.5, dtype=torch.float64))
    positive = eigenvalues.imag[eigenvalues.imag > 0].sort().values
    torch.testing.assert_close(frequencies("legs"), positive.float().expand(M, -1))


def test_defaults_are_published_and_parameters_counted():
    torch.manual_seed(0)
    layer = S4D(LayerSpec(dim=64, num_heads=2, causal=True))
    assert sum(parameter.numel() for parameter in layer.parameters()) == 130 * 64 + 2 * 64**2 + 2 * 64
    assert layer.ssm.frequency.shape == (64, 32)
    dt = layer.ssm.log_dt.exp()
    assert 1e-3 <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 1e-1  # log-uniform: both ends are reached
    torch.testing.assert_close(-layer.ssm.log_decay.exp(), torch.full((64, 32), -0.5))


def test_what_it_cannot_be_is_refused_with_the_way_out():
    spec = LayerSpec(dim=M, num_heads=1, causal=True)
    with pytest.raises(ValueError, match="must be even and positive, got 5; nearest: 4, 6"):
        S4D(spec, state_dim=5)
    with pytest.raises(ValueError, match="init must be one of lin, inv, legs, got 'hippo'"):
        S4D(spec, init="hippo")
    with pytest.raises(ValueError, match=r"got dt_min=0\.2 and dt_max=0\.1"):
        S4D(spec, dt_min=0.2)
    with pytest.raises(UnsupportedPattern, match="a kernel needs a distance"):
        S4D(LayerSpec(dim=M, num_heads=1, causal=True, cross=True))
