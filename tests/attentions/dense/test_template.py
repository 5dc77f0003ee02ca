"""The token-mixing template: every mechanism in it equals its matrix times its values, and its own formula in loops."""

import cmath
import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.fnet import FNet
from attentions.dense.mlp_mixer import MLPMixer
from attentions.dense.softmax_mixer import SoftmaxMixer
from attentions.ssm.longconv import LongConv

B, T, M, H, LIMIT = 2, 7, 15, 3, 11


def make(kind, causal=False, limit=LIMIT, cross=False, **keywords):
    torch.manual_seed(0)
    spec = LayerSpec(dim=M, num_heads=H, causal=causal, cross=cross, max_length=limit)
    return kind(spec, **keywords).double()


def stream(length=T):
    return torch.randn(B, length, M, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


MASK = torch.tensor([[False, True, True, False, True, True, True], [True, True, True, True, True, False, False]])
FORMS = [
    (FNet, False, {"orthonormal": False}),
    (FNet, False, {"orthonormal": True}),
    (MLPMixer, False, {"hidden": 5}),
    (LongConv, False, {}),
    (LongConv, True, {}),
    (SoftmaxMixer, False, {}),
    (SoftmaxMixer, True, {}),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "causal", "keywords"), FORMS)
def test_forward_is_the_matrix_times_the_values(kind, causal, keywords, masked, agree):
    layer, x, mask = make(kind, causal, **keywords), stream(), MASK if masked else None
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x, key_mask=mask), lambda: layer.mixed(x, key_mask=mask), inputs)
    matrix = layer.matrix(x, key_mask=mask)
    assert matrix.shape[-2:] == (T, T) and matrix.shape[0] in (1, B)
    if causal:
        assert matrix.triu(1).eq(0).all()
    if masked:
        assert matrix.transpose(-1, -2).masked_select(~MASK[:, None, :, None]).eq(0).all()


def test_the_softmax_matrix_also_covers_cross_attention(agree):
    layer, x, context = make(SoftmaxMixer, cross=True), stream(5), stream()
    agree(lambda: layer(x, context, key_mask=MASK), lambda: layer.mixed(x, context, key_mask=MASK), [x, context])
    assert layer.matrix(x, context).shape == (B, H, 5, T)


@pytest.mark.parametrize("orthonormal", [False, True])
def test_fnet_is_the_real_part_of_two_fourier_sums(orthonormal, agree):
    layer, x = make(FNet, orthonormal=orthonormal), stream()

    def fourier(size):
        rows = [[cmath.exp(-2j * math.pi * n * m / size) for m in range(size)] for n in range(size)]
        return torch.tensor(rows, dtype=torch.complex128)

    scale = 1 / math.sqrt(T * M) if orthonormal else 1.0
    agree(lambda: layer(x), lambda: scale * (fourier(T) @ x.to(torch.complex128) @ fourier(M)).real, [x])
    assert not list(layer.parameters())


@pytest.mark.parametrize("mask", [None, MASK])
def test_mlp_mixer_is_a_two_layer_network_of_the_positions_of_each_channel(mask, agree):
    layer, x = make(MLPMixer, hidden=5), stream()

    def naive():
        outputs = []
        for b in range(B):
            columns = []
            for c in range(M):
                inputs = [x[b, s, c] * (1.0 if mask is None or mask[b, s] else 0.0) for s in range(T)]
                hidden = [sum(layer.weight_in[n, s] * inputs[s] for s in range(T)) for n in range(5)]
                hidden = [z * (1 + torch.erf(z / math.sqrt(2))) / 2 for z in hidden]
                columns.append(
                    torch.stack([sum(layer.weight_out[t, n] * hidden[n] for n in range(5)) for t in range(T)])
                )
            outputs.append(torch.stack(columns, dim=-1))
        return torch.stack(outputs)

    agree(lambda: layer(x, key_mask=mask), naive, [x, *layer.parameters()])


def test_a_shorter_sequence_is_one_of_full_length_with_zeros_behind():
    layer, x = make(MLPMixer, hidden=5), stream()
    padded = torch.cat([x, torch.zeros(B, LIMIT - T, M, dtype=x.dtype)], dim=1)
    torch.testing.assert_close(layer(x), layer(padded)[:, :T])
    with pytest.raises(ValueError, match="the MLP covers max_length=11 positions, got 12"):
        layer(stream(12))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("causal", [True, False])
def test_long_convolution_is_a_sum_over_distances(causal, mask, agree):
    layer, x = make(LongConv, causal), stream()

    def naive():
        outputs = []
        for b in range(B):
            values = [layer.v_proj.weight @ x[b, s] * (1.0 if mask is None or mask[b, s] else 0.0) for s in range(T)]
            for t in range(T):
                total = torch.zeros(M, dtype=x.dtype)
                for s in range(T):
                    if s <= t:
                        total = total + layer.kernel[0, :, t - s] * values[s]
                    elif not causal:
                        total = total + layer.kernel[1, :, s - t - 1] * values[s]
                outputs.append(total)
        return torch.stack(outputs).view(B, T, M)

    agree(lambda: layer(x, key_mask=mask), naive, [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_beyond_its_longest_distance_a_long_convolution_reads_nothing(causal):
    layer, x = make(LongConv, causal, limit=3), stream()
    torch.testing.assert_close(layer(x), layer.mixed(x))
    output = layer(x + torch.nn.functional.one_hot(torch.tensor(1), T).double()[:, None]) - layer(x)
    moved = output.abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [not causal, True, True, True, False, False, False]
    if causal:
        _, state = layer.prefill(x[:, :5])
        torch.testing.assert_close(layer.step(x[:, 5:6], state)[0], layer(x)[:, 5:6])
        assert state.values.shape == (B, 3, M) and layer.state_bytes(5) == 4 * 3 * M


@pytest.mark.parametrize(
    ("kind", "causal", "keywords", "ratio"),
    [
        (FNet, False, {}, 0.0),
        (MLPMixer, False, {"hidden": 16}, 1.0),
        (LongConv, True, {}, 1.25),
        (LongConv, False, {}, 2.25),
        (SoftmaxMixer, True, {}, 1.0),
    ],
)
def test_parameters_are_those_of_the_docstring(kind, causal, keywords, ratio):
    layer = kind(LayerSpec(dim=32, num_heads=2, causal=causal, max_length=128), **keywords)
    assert sum(p.numel() for p in layer.parameters()) == ratio * 4 * 32 * 32


def test_a_hidden_width_of_zero_is_refused():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        make(MLPMixer, hidden=0)
