"""Combiner's four forms against loops over what a query reads directly and the regions that it reads as a whole."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.lowrank.combiner_axial import CombinerAxial, CombinerRowmajor
from attentions.lowrank.combiner_fixed import CombinerFixed
from attentions.lowrank.combiner_logn import CombinerLogN

B, M, H, SIZE = 2, 30, 6, 4
ROWS = {CombinerFixed: {"segment_size": SIZE}, CombinerLogN: {}, CombinerAxial: {"columns": SIZE}}
ALL = {**ROWS, CombinerRowmajor: {"columns": SIZE}}


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[1, :5] = False  # a whole segment, and queries that see nothing
    return mask


def fixed(layer, i, length):
    segments = [list(range(a, min(a + SIZE, length))) for a in range(0, length, SIZE)]
    if layer.spec.cross:
        return [], segments
    own = i // SIZE
    if layer.spec.causal:
        return [j for j in segments[own] if j <= i], segments[:own]
    return segments[own], segments[:own] + segments[own + 1 :]


def logn(layer, i, length):
    regions = []
    for level in range(10):
        block = i >> level
        sibling = range((block ^ 1) << level, ((block ^ 1) + 1) << level)
        if block % 2 or not layer.spec.causal:
            regions.append([j for j in sibling if j < length])
    return [i], regions


def axial(layer, i, length):
    causal, cell = layer.spec.causal, lambda j: divmod(j, SIZE)
    s, n = cell(i)
    everything = range(length)
    above = [j for j in everything if cell(j)[0] < s]
    below = [] if causal else [j for j in everything if cell(j)[0] > s]
    row = [j for j in everything if cell(j)[0] == s and (j <= i or not causal)]
    column = [j for j in above + below if cell(j)[1] == n]
    regions = [[j for j in side if cell(j)[1] == m] for side in (above, below) for m in range(SIZE) if m != n]
    for t in sorted({cell(j)[0] for j in above + below}):
        regions += [[j for j in everything if cell(j)[0] == t and cell(j)[1] < n]]
        regions += [[j for j in everything if cell(j)[0] == t and cell(j)[1] > n]]
    return row + column, regions


RULES = {CombinerFixed: fixed, CombinerLogN: logn, CombinerAxial: axial}


def heads_of(x, proj, num_heads):
    """Projected inputs [B, T, H, D], grouped ones repeated."""
    return (x @ proj.weight.T).unflatten(-1, (num_heads, -1)).repeat_interleave(H // num_heads, dim=2)


def softmax(q, k, v):
    """Of every head: a query [H, D] reads keys and values [n, H, D]; nothing where n = 0."""
    weights = torch.exp((q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1]))
    return (weights * v).sum(0) / weights.sum(0) if len(k) else 0 * q


def naive(layer, x, source, mask=None):
    """The mixture, query by query: one softmax over positions and regions, another inside each region."""
    groups, rule = layer.spec.kv_heads, RULES[type(layer)]
    q, own_q = heads_of(x, layer.q_proj, H), heads_of(source, layer.q_proj, H)
    k, v = heads_of(source, layer.k_proj, groups), heads_of(source, layer.v_proj, groups)
    outputs = []
    for b in range(B):
        seen = [j for j in range(source.shape[1]) if mask is None or mask[b, j]]
        for i in range(x.shape[1]):
            direct, regions = rule(layer, i, source.shape[1])
            keys, values = [k[b, j] for j in direct if j in seen], [v[b, j] for j in direct if j in seen]
            for region in regions:
                if region := [j for j in region if j in seen]:
                    keys.append(k[b, region].max(0).values)
                    values.append(softmax(own_q[b, region].max(0).values, k[b, region], v[b, region]))
            outputs.append(softmax(q[b, i], torch.stack(keys), torch.stack(values)) if keys else 0 * q[b, i])
    return torch.stack(outputs).view_as(x) @ layer.out_proj.weight.T


def naive_rowmajor(layer, x, mask=None):
    groups, width, causal = layer.spec.kv_heads, layer.columns, layer.spec.causal
    q = heads_of(x, layer.q_proj, H)
    k, v = heads_of(x, layer.k_proj, groups), heads_of(x, layer.v_proj, groups)
    outputs = []
    for b in range(B):
        seen = [j for j in range(x.shape[1]) if mask is None or mask[b, j]]
        value, key = {}, {}  # of the region at each position
        for i in seen:
            row = [j for j in seen if j // width == i // width]
            value[i] = softmax(q[b, i], k[b, row], v[b, row])
            y = x[b, i] + layer.summary_proj.weight @ value[i].flatten()
            normed = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 1e-5)
            normed = normed * layer.summary_norm.weight + layer.summary_norm.bias
            key[i] = heads_of(normed[None, None], layer.row_proj, groups)[0, 0]
        for i in range(x.shape[1]):
            row = [j for j in seen if j // width == i // width and (j <= i or not causal)]
            others = [j for j in seen if j % width == i % width and j // width != i // width and (j < i or not causal)]
            keys = [k[b, j] for j in row] + [key[j] for j in others]
            values = [v[b, j] for j in row] + [value[j] for j in others]
            outputs.append(softmax(q[b, i], torch.stack(keys), torch.stack(values)) if keys else 0 * q[b, i])
    return torch.stack(outputs).view_as(x) @ layer.out_proj.weight.T


@pytest.mark.parametrize(("num_kv_heads", "masked"), [(6, False), (2, True)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("row", ALL)
def test_self_attention_reads_its_positions_and_regions(row, causal, num_kv_heads, masked, make_layer, agree):
    layer = make_layer(row, dim=M, num_heads=H, causal=causal, num_kv_heads=num_kv_heads, **ALL[row])
    x, mask = stream(13), mask_of(13) if masked else None
    oracle = (lambda: naive_rowmajor(layer, x, mask)) if row is CombinerRowmajor else lambda: naive(layer, x, x, mask)
    agree(lambda: layer(x, key_mask=mask), oracle, [x, *layer.parameters()])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_segments_of_the_context(causal, masked, make_layer, agree):
    layer = make_layer(CombinerFixed, dim=M, causal=causal, cross=True, num_kv_heads=2, segment_size=SIZE)
    x, context, mask = stream(5), stream(11, seed=2), mask_of(11) if masked else None
    agree(
        lambda: layer(x, context, key_mask=mask),
        lambda: naive(layer, x, context, mask),
        [x, context, *layer.parameters()],
    )


def weights_of(layer, length):
    """[B, T, H, S]: what `attend` makes of values that are unit vectors."""
    x = stream(length)
    q, (k, _) = layer.query(x), layer.key_value(x)
    unit = torch.eye(length, dtype=x.dtype)[None, :, None].expand(B, -1, layer.spec.kv_heads, -1)
    return layer.attend(q, k, unit)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 21])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("row", ROWS)
def test_every_position_of_the_past_has_a_weight_and_they_sum_to_one(row, causal, length, make_layer):
    weights = weights_of(make_layer(row, dim=M, causal=causal, num_kv_heads=2, **ROWS[row]), length)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    past = torch.ones(length, length, dtype=torch.bool)
    past = past.tril() if causal else past
    assert torch.equal((weights > 0).all(2).all(0), past) and torch.equal((weights != 0).any(2).any(0), past)


@pytest.mark.parametrize("causal", [True, False])
def test_the_weights_of_rowmajor_sum_to_one(causal, make_layer):
    layer, x = make_layer(CombinerRowmajor, dim=M, causal=causal, columns=SIZE), stream(13)
    q, (k, v) = layer.query(x), layer.key_value(x)
    heads = layer.attend(q, k, torch.ones_like(v), stream=x)
    torch.testing.assert_close(heads, torch.ones_like(heads))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        (CombinerFixed, {"segment_size": 1}),
        (CombinerFixed, {"segment_size": 13}),
        (CombinerFixed, {"segment_size": 50}),
        (CombinerAxial, {"columns": 1}),
        (CombinerAxial, {"columns": 13}),
        (CombinerAxial, {"columns": 50}),
        (CombinerRowmajor, {"columns": 13}),
        (CombinerRowmajor, {"columns": 50}),
    ],
)
def test_regions_of_one_position_and_no_regions_are_softmax(row, sizes, causal, make_layer):
    layer, exact = make_layer(row, causal=causal, **sizes), make_layer(Softmax, causal=causal)
    exact.load_state_dict({name: layer.state_dict()[name] for name in exact.state_dict()})
    x = torch.randn(B, 13, 60, dtype=torch.float64)
    torch.testing.assert_close(layer(x), exact(x))


@pytest.mark.parametrize("causal", [True, False])
def test_turned_region_keys_of_rowmajor_keep_its_scores_relative(causal, make_layer):
    layer = make_layer(CombinerRowmajor, dim=36, causal=causal, rotary_base=100.0, columns=SIZE)
    x = torch.randn(B, 13, 36, dtype=torch.float64)
    want, rotate = layer(x), layer._rotate
    layer._rotate = lambda heads, start: rotate(heads, start + 5)  # the whole sequence, 5 positions later
    torch.testing.assert_close(layer(x), want, rtol=0.0, atol=1e-4)  # angles are float32


@pytest.mark.parametrize("row", ALL)
def test_a_state_written_in_parts_reads_as_all_at_once(row, make_layer):
    layer, x = make_layer(row, dim=M, num_kv_heads=2, **ALL[row]), stream(23)
    q, (k, v), want = layer.query(x), layer.key_value(x), layer(x)
    for cuts in ([7, 9, 7], [4, 4, 15], [1, 22], [16, 7], [23]):
        state = layer.init_memory(B, x)
        for part in zip(*(tensor.split(cuts, dim=1) for tensor in (k, v, q, x)), strict=True):
            state = layer.update(state, part[0], part[1], own=part[2], stream=part[3])
        torch.testing.assert_close(layer.merge(x, layer.read(q[:, -1:], state)), want[:, -1:])
        assert state.nbytes == 2 * B * layer.state_bytes(23)


def test_the_state_of_fixed_is_a_segment_and_a_pair_for_each_finished_one(make_layer):
    layer, x = make_layer(CombinerFixed, dim=M, num_kv_heads=2, segment_size=SIZE), stream(13)
    state = layer.init_state(B)
    for t in range(13):
        _, state = layer.step(x[:, t : t + 1], state)
        finished, current = t // SIZE, t % SIZE + 1
        numbers = finished * (2 * 5 + 6 * 5) + current * 2 * (5 + 5) + 6 * 5  # keys of groups, values of heads, q
        assert state.nbytes == B * 8 * numbers


def test_the_state_of_logn_has_a_query_for_each_region(make_layer):
    layer, x = make_layer(CombinerLogN, dim=M, num_kv_heads=2), stream(13)
    state = layer.init_state(B)
    for t in range(13):
        _, state = layer.step(x[:, t : t + 1], state)
        assert state.tops.shape == (B, 1 + bin(t).count("1"), H, 5)


@pytest.mark.parametrize("row", [CombinerAxial, CombinerRowmajor])
def test_a_grid_brings_its_columns_and_its_size(row):
    def layer(grid):
        torch.manual_seed(0)
        return row(LayerSpec(dim=30, num_heads=6, causal=True, grid=grid), columns=4)

    assert (layer((5, 3)).columns, layer((5, 3, 2)).columns, layer((15,)).columns, layer(None).columns) == (3, 6, 4, 4)
    x = torch.randn(B, 15, 30)
    assert not torch.allclose(layer((5, 3))(x), layer(None)(x))
    torch.testing.assert_close(layer((5, 3)).prefill(x[:, :7])[0], layer((5, 3))(x)[:, :7])  # a part of an image
    with pytest.raises(ValueError, match=r"a grid of \(5, 3\) holds 15 positions, got 14"):
        layer((5, 3))(x[:, :14])


def test_parameters_are_those_of_softmax_and_of_rowmajor_half_as_many_more(make_layer):
    for row in ALL:
        layer = make_layer(row, dim=32, num_heads=2, **ALL[row])
        extra = 2 * 32**2 + 2 * 32 if row is CombinerRowmajor else 0
        assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 32**2 + extra


def test_the_published_sizes_and_sizes_below_one(make_layer):
    names = {CombinerFixed: "segment_size", CombinerAxial: "columns", CombinerRowmajor: "columns"}
    for row, name in names.items():
        assert getattr(make_layer(row), name) == 128
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make_layer(row, **{name: 0})
