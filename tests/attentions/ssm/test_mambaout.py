"""MambaOut's gated block and S6 against their formulas, and the block around other mechanisms."""

import functools
import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.dense.softmax import Softmax
from attentions.ssm.mambaout import GatedMLP, MambaOut
from attentions.ssm.s6 import S6

B, T, M, HID, C, K = 2, 11, 7, 13, 5, 3
OPTIONS = dict(dim=M, num_heads=1, kernel_size=K, expansion=HID / M + 1e-6, conv_ratio=C / M + 1e-6)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def stream(length=T, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gated(layer, x, convolve):
    """fc2(GELU(g) * [i, c]) of one sequence x [T, M]; `convolve` gives c [T, C] from the inputs of the convolution."""
    rows = torch.stack([layer.fc1.weight @ row + layer.fc1.bias for row in x])
    g, i, u = rows[:, :HID], rows[:, HID : 2 * HID - C], rows[:, 2 * HID - C :]
    c = convolve(u)
    return torch.stack(
        [layer.fc2.weight @ (gelu(g[t]) * torch.cat([i[t], c[t]])) + layer.fc2.bias for t in range(len(x))]
    )


def on_a_line(layer, u, causal, seen):
    offset = K - 1 if causal else K // 2
    rows = []
    for t in range(len(u)):
        total = layer.line.bias
        for i in range(K):
            s = t + i - offset
            if 0 <= s < len(u) and seen[s]:
                total = total + layer.line.weight[:, i] * u[s]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
def test_the_block_equals_its_formula_on_a_line(causal, make_layer, agree):
    layer, x = make_layer(MambaOut, causal=causal, **OPTIONS), stream()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    for seen in (torch.ones(B, T, dtype=torch.bool), mask):

        def naive(seen=seen):
            return torch.stack(
                [gated(layer, x[b], lambda u, b=b: on_a_line(layer, u, causal, seen[b])) for b in range(B)]
            )

        agree(lambda seen=seen: layer(x, key_mask=seen), naive, [x, *layer.parameters()])


def test_on_a_grid_the_kernel_spans_rows_and_columns(agree):
    rows, columns = 2, 5
    torch.manual_seed(0)
    spec = LayerSpec(dim=M, num_heads=1, causal=False, grid=(rows, columns))
    layer = MambaOut(spec, kernel_size=K, expansion=HID / M + 1e-6, conv_ratio=C / M + 1e-6).double()
    x = stream(rows * columns)

    def convolve(u):
        out = []
        for t in range(rows * columns):
            total = layer.plane.conv.bias
            for dy in range(-1, 2):
                for dx in range(-1, 2):
                    y, z = t // columns + dy, t % columns + dx
                    if 0 <= y < rows and 0 <= z < columns:
                        total = total + layer.plane.conv.weight[:, 0, dy + 1, dx + 1] * u[y * columns + z]
            out.append(total)
        return torch.stack(out)

    agree(lambda: layer(x), lambda: torch.stack([gated(layer, x[b], convolve) for b in range(B)]), [x])
    with pytest.raises(ValueError, match="the slot's grid is 2 x 5, got a sequence of 11 positions"):
        layer(stream(T))


def test_a_delta_kernel_is_a_gated_mlp_position_by_position(make_layer):
    layer, mlp, x = (
        make_layer(MambaOut, **OPTIONS),
        make_layer(GatedMLP, dim=M, num_heads=1, expansion=HID / M + 1e-6),
        stream(),
    )
    with torch.no_grad():
        layer.line.weight.zero_()
        layer.line.weight[:, -1] = 1
        layer.line.bias.zero_()
    rows = torch.cat([layer(x[:, t : t + 1]) for t in range(T)], dim=1)
    torch.testing.assert_close(layer(x), rows)
    for name in ("fc1", "fc2"):
        mlp.get_submodule(name).load_state_dict(layer.get_submodule(name).state_dict())
    with torch.no_grad():
        mlp.line.weight.fill_(1)
        mlp.line.bias.zero_()
    torch.testing.assert_close(mlp(x), layer(x))


def test_after_l_blocks_an_output_reaches_l_times_kernel_less_one_back_and_no_further(make_layer):
    blocks, x = [make_layer(MambaOut, seed=seed, **OPTIONS) for seed in range(3)], stream()
    for depth in (1, 2, 3):
        reach = depth * (K - 1)

        def run(x, depth=depth):
            for block in blocks[:depth]:
                x = x + block(x)
            return x

        for distance, moves in ((reach, True), (reach + 1, False)):
            changed = x.clone()
            changed[:, T - 1 - distance] += 1
            assert bool((run(changed)[:, -1] != run(x)[:, -1]).any()) == moves


@pytest.mark.parametrize("inner", [S6, Softmax, functools.partial(MambaOut, kernel_size=3)])
def test_a_mixer_stands_behind_the_convolution_and_decodes_with_it(inner, make_layer):
    layer, x = make_layer(MambaOut, mixer=inner, **OPTIONS), stream()
    g, i, u = layer.fc1(x).split([HID, HID - C, C], dim=-1)
    c = layer.mixer(torch.nn.functional.silu(layer.line(u)))
    torch.testing.assert_close(layer(x), layer.fc2(gelu(g) * torch.cat([i, c], dim=-1)))
    state, outputs = layer.init_state(B), []
    for t in range(T):
        output, state = layer.step(x[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))
    assert state.nbytes == 2 * B * layer.state_bytes(T)  # float64


@pytest.mark.parametrize("causal", [True, False])
def test_s6_equals_its_recurrence(causal, make_layer, agree):
    layer, x = make_layer(S6, dim=M, num_heads=1, causal=causal, state_dim=3), stream()
    ssm = layer.ssm

    def recurrence(rows):
        h, ys = torch.zeros(M, 3, dtype=torch.float64), []
        for u in rows:
            low, b, c = (ssm.x_proj.weight @ u).split([1, 3, 3])
            dt = torch.log1p(torch.exp(ssm.dt_weight @ low + ssm.dt_bias))
            h = torch.exp(-dt[:, None] * ssm.A_log.exp()) * h + (dt * u)[:, None] * b
            ys.append(h @ c + ssm.D * u)
        return ys

    def naive():
        sequences = []
        for b in range(B):
            ys = recurrence(list(x[b]))
            if not causal:
                ys = [(one + other) / 2 for one, other in zip(ys, recurrence(list(x[b])[::-1])[::-1], strict=True)]
            sequences.append(torch.stack(ys))
        return torch.stack(sequences)

    agree(lambda: layer(x), naive, [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_s6_reads_a_context_through_the_state_after_it(causal, make_layer):
    layer = make_layer(S6, dim=M, num_heads=1, causal=causal, cross=True, state_dim=3)
    x, context = stream(), stream(4, seed=2)
    memory = layer.ssm.scan(context)[1]
    c = layer.ssm.x_proj(x)[..., -3:]
    expected = torch.einsum("btn,bmn->btm", c, memory) + layer.ssm.D * x
    torch.testing.assert_close(layer(x, context), expected)
    with pytest.raises(ValueError, match="decodes over a context"):
        layer.init_state(B)


def test_sizes_are_the_authors():
    layer = MambaOut(LayerSpec(dim=96, num_heads=3, causal=False, grid=(8, 8)))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes["fc1.weight"] == (2 * 256, 96) and shapes["fc2.weight"] == (96, 256)
    assert shapes["plane.conv.weight"] == (96, 1, 7, 7) and layer.sizes == [256, 160, 96]


def test_what_it_cannot_be_is_refused_with_the_way_out():
    spec = LayerSpec(dim=M, num_heads=1, causal=False)
    for keywords, words in (
        ({"conv_ratio": 3.0}, "got 3.0 with dim=7 and expansion="),
        ({"conv_ratio": 0.0}, "conv_ratio must lie between"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4; nearest: 3, 5"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            MambaOut(spec, **keywords)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 2; nearest: 1, 3"):
        MambaOut(LayerSpec(dim=M, num_heads=1, causal=False, grid=(2, 2)), kernel_size=2)
    with pytest.raises(UnsupportedPattern, match="a kernel needs a distance"):
        MambaOut(LayerSpec(dim=M, num_heads=1, causal=False, cross=True))
