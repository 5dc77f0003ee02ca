"""Transformer-LS against loops over the positions and rows that a query may read."""

import math

import pytest
import torch
import torch.nn.functional as F

from attentions.lowrank.long_short import LongShort

B, T, S, M, H = 2, 13, 11, 60, 6
SIZES = {"window": 4, "num_landmarks": 3, "chunk_size": 5, "chunk_rank": 2}


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-5)


def rows_of(layer, k, v, logits):
    """LN_G(P^T K) and LN_G(P^T V) of some positions k, v [S, D] with logits [S, r]."""
    p = torch.exp(logits) / torch.exp(logits).sum(0)
    return norm(layer.row_norm, p.T @ k), norm(layer.row_norm, p.T @ v)


def naive(layer, x, source, key_mask=None, sizes=SIZES):
    spec, width = layer.spec, M // H
    window, chunk, causal = sizes["window"], sizes["chunk_size"], spec.causal and not spec.cross
    r = sizes["chunk_rank"] if causal else sizes["num_landmarks"]
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.pool_proj)
    inputs = (x, source, source, source)
    q, k, v, logits = (part @ proj.weight.T for part, proj in zip(inputs, projections, strict=True))
    outputs = []
    for b in range(B):
        known = [j for j in range(source.shape[1]) if key_mask is None or key_mask[b, j]]
        for i in range(x.shape[1]):
            if causal:
                blocks = [[j for j in known if j // chunk == c] for c in range(i // chunk)]
                near = [j for j in known if i - window < j <= i]
            else:
                blocks, start = [known], i // window * window  # of the query's segment
                near = [j for j in known if start - window // 2 <= j < start + window + window // 2]
            heads = []
            for h in range(H):
                g = h * spec.kv_heads // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                pool = slice(g * r, (g + 1) * r)
                read = [rows_of(layer, k[b, js, shared], v[b, js, shared], logits[b, js, pool]) for js in blocks if js]
                if near and not spec.cross:
                    read.append(tuple(norm(layer.near_norm, part[b, near, shared]) for part in (k, v)))
                if not read:
                    heads.append(torch.zeros(width, dtype=x.dtype))
                    continue
                keys, values = (torch.cat(part) for part in zip(*read, strict=True))
                weights = torch.exp(keys @ q[b, i, own] / math.sqrt(width))
                heads.append(weights @ values / weights.sum())
            outputs.append(torch.cat(heads))
    return torch.stack(outputs).reshape(B, -1, M) @ layer.out_proj.weight.T


def mask_of(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1, :6] = False  # a whole chunk, and the first windows
    return mask


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_reads_the_window_and_the_rows(causal, masked, num_kv_heads, make_layer, agree):
    layer = make_layer(LongShort, causal=causal, num_kv_heads=num_kv_heads, **SIZES)
    x, mask = torch.randn(B, T, M, dtype=torch.float64), mask_of(T) if masked else None
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_rows_of_the_whole_context(causal, make_layer, agree):
    layer = make_layer(LongShort, causal=causal, cross=True, **SIZES)
    x, context = torch.randn(B, 7, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    mask = mask_of(S)
    agree(
        lambda: layer(x, context, key_mask=mask),
        lambda: naive(layer, x, context, mask),
        [x, context, *layer.parameters()],
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "length"), [(1, 7), (3, 7), (50, 7), (4, 1)])
def test_windows_odd_longer_than_the_sequence_and_of_one_position(window, length, causal, make_layer):
    sizes = {**SIZES, "window": window}
    layer, x = make_layer(LongShort, causal=causal, **sizes), torch.randn(B, length, M, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x, x, sizes=sizes))


def test_rotary_positions_turn_the_window_and_not_the_rows(make_layer):
    plain, turned = (make_layer(LongShort, rotary_base=base, **SIZES) for base in (None, 100.0))
    x = torch.randn(B, T, M, dtype=torch.float64)
    assert not torch.allclose(plain(x), turned(x))
    for layer in (plain, turned):  # with equal keys near by, turned or not, only the rows decide
        torch.nn.init.zeros_(layer.near_norm.weight)
        torch.nn.init.zeros_(layer.near_norm.bias)
    torch.testing.assert_close(plain(x), turned(x))


def test_decoding_keeps_the_window_the_rows_and_the_open_chunk(make_layer):
    layer, x = make_layer(LongShort, rotary_base=100.0, **SIZES), torch.randn(B, T, M, dtype=torch.float64)
    want, state = layer(x), layer.init_state(B)
    for t in range(T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
        numbers = 2 * min(t + 1, 4) + 2 * 2 * ((t + 1) // 5)  # keys and values of window and rows
        bare = (t + 1) % 5 * H * (2 * 10 + 2)
        assert state.nbytes == 8 * B * (numbers * M + bare) == 2 * B * layer.state_bytes(t + 1)


def test_the_extra_parameters_are_few(make_layer):
    def ratio(**keywords):
        layer = make_layer(LongShort, **keywords)
        return sum(parameter.numel() for parameter in layer.parameters()) / (4 * keywords["dim"] ** 2)

    assert round(ratio(dim=512, num_heads=8, causal=False, num_landmarks=16), 2) == 1.06
    assert round(ratio(dim=32, num_heads=2, causal=False, num_landmarks=4), 2) == 1.08
    assert round(ratio(dim=32, num_heads=2, causal=True), 2) == 1.03


@pytest.mark.parametrize("name", SIZES)
def test_sizes_start_at_one(name, make_layer):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_layer(LongShort, **{**SIZES, name: 0})
