"""Core-context-aware attention against loops over cores and positions."""

import math

import pytest
import torch

from attentions.dense.softmax import Softmax
from attentions.lowrank.cca import CCA
from attentions.sparse._selection import merge

B, M, H = 2, 30, 6


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[1, :7] = False  # whole groups, and queries that see nothing
    return mask


def read_directly(layer, i, length):
    """Groups whose positions query i reads one by one, and groups that it does not read at all."""
    g, s = layer.group_size, layer.window
    groups = range(math.ceil(length / g))
    if layer.spec.cross:
        return [], []
    if layer.spec.causal:
        pooled = max(0, (i + 1 - s) // g)  # of the i + 1 visible positions
        return [a for a in groups if pooled <= a <= i // g], [a for a in groups if a > i // g]
    near = range(i - s // 2, i + s // 2 + 1)
    return [a for a in groups if any(a * g <= j < (a + 1) * g for j in near)], []


def heads_of(x, proj, num_heads):
    return (x @ proj.weight.T).unflatten(-1, (num_heads, -1)).repeat_interleave(H // num_heads, dim=2)


def core(pool, q, k, v):
    """Of one group [n, H, D]; q are the queries of its own positions."""
    if pool == "max":
        return k.max(0).values, v.max(0).values
    weights = torch.ones_like(k[..., :1])
    if pool == "attention":
        weights = torch.exp((q[-1] * k).sum(-1, keepdim=True) / math.sqrt(k.shape[-1]))
    return (weights * k).sum(0) / weights.sum(0), (weights * v).sum(0) / weights.sum(0)


def parts(layer, x, source, mask=None):
    """Keys and values of the cores and of the positions that each query [b, i] reads, and the queries."""
    g, groups = layer.group_size, layer.spec.kv_heads
    q, own_q = heads_of(x, layer.q_proj, H), heads_of(source, layer.q_proj, H)
    k, v = heads_of(source, layer.k_proj, groups), heads_of(source, layer.v_proj, groups)
    for b in range(B):
        seen = [j for j in range(source.shape[1]) if mask is None or mask[b, j]]
        for i in range(x.shape[1]):
            direct, later = read_directly(layer, i, source.shape[1])
            positions = [j for j in seen if j // g in direct and (j <= i or not layer.spec.causal)]
            others = [[j for j in seen if j // g == a] for a in range(math.ceil(source.shape[1] / g))]
            cores = [
                core(layer.pool, own_q[b, js], k[b, js], v[b, js])
                for a, js in enumerate(others)
                if js and a not in direct + later
            ]
            yield q[b, i], cores, [(k[b, j], v[b, j]) for j in positions]


def naive(layer, x, source, mask=None):
    outputs = []
    for q, cores, near in parts(layer, x, source, mask):
        read = cores + near
        if read:
            keys, values = (torch.stack(part) for part in zip(*read, strict=True))
            weights = torch.exp((q * keys).sum(-1, keepdim=True) / math.sqrt(q.shape[-1]))
            outputs.append((weights * values).sum(0) / weights.sum(0))
        else:
            outputs.append(0 * q)
    return torch.stack(outputs).view_as(x) @ layer.out_proj.weight.T


@pytest.mark.parametrize(("window", "group_size"), [(4, 3), (5, 2), (1, 4), (3, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_reads_cores_and_the_latest_positions(causal, window, group_size, make_layer, agree):
    layer = make_layer(CCA, dim=M, causal=causal, num_kv_heads=2, window=window, group_size=group_size)
    x = stream(11)
    for mask in (None, mask_of(11)) if window == 4 else (None,):
        agree(
            lambda mask=mask: layer(x, key_mask=mask),
            lambda mask=mask: naive(layer, x, x, mask),
            [x, *layer.parameters()],
        )


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_cores_of_the_whole_context(causal, make_layer, agree):
    layer = make_layer(CCA, dim=M, causal=causal, cross=True, num_kv_heads=2, window=4, group_size=3)
    x, context = stream(5), stream(11, seed=2)
    for mask in (None, mask_of(11)):
        agree(
            lambda mask=mask: layer(x, context, key_mask=mask),
            lambda mask=mask: naive(layer, x, context, mask),
            [x, context, *layer.parameters()],
        )


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_cores_by_the_mean_and_by_the_maximum(pool, make_layer, agree):
    layer, x, mask = make_layer(CCA, dim=M, window=4, group_size=3, pool=pool), stream(11), mask_of(11)
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [{"window": 3, "group_size": 1}, {"window": 26, "group_size": 3}])
def test_a_window_of_all_and_groups_of_one_are_softmax(sizes, causal, make_layer):
    layer, exact = make_layer(CCA, causal=causal, **sizes), make_layer(Softmax, causal=causal)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(B, 13, 60, dtype=torch.float64)
    torch.testing.assert_close(layer(x), exact(x))


def test_groups_of_one_are_softmax_in_cross_attention(make_layer):
    layer, exact = (make_layer(c, cross=True, **k) for c, k in ((CCA, {"group_size": 1}), (Softmax, {})))
    exact.load_state_dict(layer.state_dict())
    x, context = torch.randn(2, B, 13, 60, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), exact(x, context))


@pytest.mark.parametrize("length", [1, 5, 16, 23])
def test_the_past_is_read_once_and_at_most_s_plus_g_less_1_positions_of_it_directly(length, make_layer):
    layer, x = make_layer(CCA, dim=M, num_kv_heads=2, window=5, group_size=4), stream(length)
    q, (k, _) = layer.query(x), layer.key_value(x)
    unit = torch.eye(length, dtype=x.dtype)[None, :, None].expand(B, -1, 2, -1)
    weights = layer.attend(q, k, unit)  # of each position, through its core or directly
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    past = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal((weights > 0).all(2).all(0), past) and torch.equal((weights != 0).any(2).any(0), past)
    for i in range(length):
        direct, _ = read_directly(layer, i, length)
        assert min(5, i + 1) <= i + 1 - 4 * direct[0] <= 8


def test_cores_and_positions_merged_by_log_sum_exps_are_the_joint_softmax(make_layer):
    layer, x = make_layer(CCA, dim=M, window=4, group_size=3), stream(11)
    heads = []
    for q, cores, near in parts(layer, x, x):
        attended = []
        for read in (cores, near):
            keys, values = (torch.stack(part) for part in zip(*read, strict=True)) if read else 2 * [q[None, :][:0]]
            scores = (q * keys).sum(-1) / math.sqrt(q.shape[-1])  # [n, H]
            output = (scores.softmax(0)[..., None] * values).sum(0)
            attended.append((output[None, None], scores.logsumexp(0)[None, None]))
        heads.append(merge(attended)[0])
    torch.testing.assert_close(layer.merge(x, torch.cat(heads).view(B, 11, H, -1)), layer(x))


def test_decoding_keeps_the_cores_of_complete_groups_and_the_latest_positions(make_layer):
    layer = make_layer(CCA, dim=M, num_kv_heads=2, window=5, group_size=4)
    x, state = stream(19), layer.init_state(B)
    want = layer(x)
    for t in range(19):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
        direct = t + 1 - 4 * max(0, (t + 1 - 5) // 4)
        assert state.nbytes == B * 8 * 2 * 5 * ((t + 1) // 4 * H + direct * 2) == 2 * B * layer.state_bytes(t + 1)


@pytest.mark.parametrize("pool", ["attention", "mean", "max"])
def test_a_state_written_in_parts_reads_as_all_at_once(pool, make_layer):
    layer, x = make_layer(CCA, dim=M, num_kv_heads=2, window=5, group_size=4, pool=pool), stream(23)
    q, (k, v), want = layer.query(x), layer.key_value(x), layer(x)
    for cuts in ([7, 9, 7], [4, 4, 15], [1, 22], [16, 7], [23]):
        state = layer.init_memory(B, x)
        for part in zip(*(tensor.split(cuts, dim=1) for tensor in (k, v, q)), strict=True):
            state = layer.update(state, part[0], part[1], own=part[2])
        torch.testing.assert_close(layer.merge(x, layer.read(q[:, -1:], state)), want[:, -1:])
        assert state.nbytes == 2 * B * layer.state_bytes(23)
        assert state.cores[0].shape[2] == (H if pool == "attention" else 2)


def test_parameters_are_those_of_softmax_and_sizes_the_published_ones(make_layer):
    layer = make_layer(CCA, dim=32, num_heads=2)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 32**2
    assert (layer.group_size, layer.window, layer.pool) == (16, 1024, "attention")


def test_wrong_values_are_named(make_layer):
    for name in ("group_size", "window"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make_layer(CCA, **{name: 0})
    with pytest.raises(ValueError, match="pool must be one of attention, mean, max, got last"):
        make_layer(CCA, pool="last")
