"""NSA against a loop that compresses, ranks and reads block by block, with eq. 9 written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from attentions.sparse import _selection
from attentions.sparse.nsa import NSA

B, M, H = 2, 30, 6
SMALL = {
    "compress_block": 4,
    "compress_stride": 2,
    "select_block": 6,
    "num_selected": 4,
    "num_initial": 1,
    "num_local": 2,
    "window": 5,
}


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_read(q, keys, values):
    weights = torch.softmax(keys @ q / math.sqrt(len(q)), 0)
    return weights, weights @ values  # zero without a key


def compressed(module, x, mask, size, stride):
    """The complete blocks n with an unmasked vector, and phi(x[n d : n d + l]) of each; x [S, D]."""
    blocks, found = [], [x[:0]]
    for n in range((len(x) - size) // stride + 1 if len(x) >= size else 0):
        here = range(n * stride, n * stride + size)
        parts = [x[j] + module.places[j - n * stride] if mask[j] else torch.zeros_like(x[j]) for j in here]
        if any(mask[j] for j in here):
            blocks.append(n)
            found.append((F.gelu(torch.cat(parts) @ module.inner) @ module.outer)[None])
    return blocks, torch.cat(found)


def naive(layer, x, mask=None):
    size, stride, block = layer.compress_block, layer.compress_stride, layer.select_block
    causal, groups, (batch, length, _) = layer.spec.causal, layer.spec.kv_heads, x.shape
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    q = (x @ layer.q_proj.weight.T).view(batch, length, H, -1)
    k, v = ((x @ proj.weight.T).view(batch, length, 3, groups, -1) for proj in (layer.k_proj, layer.v_proj))
    gates = torch.sigmoid(x @ layer.gate_proj.weight.T).view(batch, length, H, 3)
    num_blocks = math.ceil(length / block)
    rows = []
    for b in range(batch):
        coarse_k = [compressed(layer.compress_k, k[b, :, 0, g], mask[b], size, stride) for g in range(groups)]
        coarse_v = [compressed(layer.compress_v, v[b, :, 0, g], mask[b], size, stride) for g in range(groups)]
        for t in range(length):
            heads = [None] * H
            for g in range(groups):
                own = range(g * H // groups, (g + 1) * H // groups)
                seen = [n for n in coarse_k[g][0] if not causal or n * stride + size - 1 <= t]
                score = [0.0] * num_blocks
                for h in own:
                    keys, values = (coarse[g][1][: len(seen)] for coarse in (coarse_k, coarse_v))
                    weights, read = softmax_read(q[b, t, h], keys, values)
                    heads[h] = gates[b, t, h, 0] * read
                    p = dict(zip(seen, weights.tolist(), strict=True))
                    for j in range(num_blocks):  # eq. 9 and 10, with blocks counted from 0
                        for m in range(block // stride):
                            for n in range(size // stride):
                                score[j] += p.get(block // stride * j + m - n, 0.0)
                current, candidates = t // block, []
                for j in range(num_blocks):
                    if (causal and j > current) or not mask[b, j * block : (j + 1) * block].any():
                        continue
                    always = j < layer.num_initial or abs(j - current) < layer.num_local
                    candidates.append((-math.inf if always else -score[j], j))
                chosen = [j for _, j in sorted(candidates)[: layer.num_selected]]
                last = t if causal else length - 1
                fine = [j for j in range(last + 1) if j // block in chosen and mask[b, j]]
                near = [j for j in range(last + 1) if abs(j - t) < layer.window and mask[b, j]]
                for h in own:
                    for branch, keys in ((1, fine), (2, near)):
                        _, read = softmax_read(q[b, t, h], k[b, keys, branch, g], v[b, keys, branch, g])
                        heads[h] = heads[h] + gates[b, t, h, branch] * read
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).view(batch, length, M)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_three_branches_read_what_the_equations_say(causal, num_kv_heads, form, make_layer, agree):
    layer = make_layer(NSA, dim=M, causal=causal, num_kv_heads=num_kv_heads, **SMALL)
    x = stream(31)  # six blocks, of which the first, two or three local ones and one or none more are read
    random = torch.rand(B, 31, generator=torch.Generator().manual_seed(2)) > 0.4
    random[0, :13] = False  # whole blocks of all kinds, and queries without a key
    x, mask = (x, random) if num_kv_heads == 2 else (x[:1], None)
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("length", [1, 3, 4, 7])
def test_sequences_shorter_than_a_block_or_two(length, make_layer):
    layer, x = make_layer(NSA, dim=M, **SMALL), stream(length)
    torch.testing.assert_close(layer(x), naive(layer, x))


@pytest.mark.parametrize("sizes", [{"compress_block": 2}, {"compress_block": 6}, {"num_selected": 3}, {"num_local": 1}])
def test_other_sizes_follow_the_equations_too(sizes, make_layer):
    layer, x = make_layer(NSA, dim=M, num_kv_heads=3, **SMALL | sizes), stream(31)
    torch.testing.assert_close(layer(x), naive(layer, x))


def test_the_selection_matters_and_is_shared_by_the_heads_of_a_group(make_layer):
    layer, x = make_layer(NSA, dim=M, num_kv_heads=2, **SMALL), stream(61)
    wider = make_layer(NSA, dim=M, num_kv_heads=2, **SMALL | {"num_selected": 9})
    assert not torch.allclose(layer(x), wider(x))
    weights = torch.rand(B, 2, 61, 29, generator=torch.Generator().manual_seed(0))
    blocks = layer.select(weights, 61, None, 0)
    assert blocks.shape == (B, 2, 61, 4)  # by key-value head
    for t in (30, 45, 60):
        assert all({0, t // 6 - 1, t // 6} < set(row) for row in blocks[:, :, t].flatten(0, 1).tolist())


def test_before_the_first_complete_block_the_compressed_branch_reads_zero(make_layer):
    layer, x = make_layer(NSA, dim=M, **SMALL), stream(23)
    seen = layer(x)
    with torch.no_grad():
        layer.compress_v.outer.add_(1.0)
    moved = (layer(x) - seen).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [t >= SMALL["compress_block"] - 1 for t in range(23)]


def test_the_state_holds_what_later_queries_read_and_no_more(make_layer):
    layer, x = make_layer(NSA, dim=M, num_kv_heads=2, rotary_base=None, **SMALL), stream(29)
    want = layer(x)
    output, state = layer.prefill(x[:, :9])
    torch.testing.assert_close(output, want[:, :9])
    for t in range(9, 29):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    held = [pair[0].shape[1] for pair in (state.compressed, state.tail, state.selected, state.window)]
    assert held == [13, 3, 29, 5]  # blocks at 0, 2, ... 24; positions 26, 27, 28; all; the window
    assert state.nbytes == 2 * B * layer.state_bytes(29)  # float64


def test_parameters_are_those_of_three_memories_and_two_compressions(make_layer):
    layer, width = make_layer(NSA, dim=M, **SMALL), M // H
    compression = 2 * (4 * width * width + width * width + 4 * width)
    assert sum(p.numel() for p in layer.parameters()) == 8 * M * M + 3 * M * H + compression


def test_the_published_defaults(make_layer):
    layer = make_layer(NSA)
    assert (layer.compress_block, layer.compress_stride) == (32, 16)
    assert (layer.select_block, layer.num_selected, layer.num_initial, layer.num_local) == (64, 16, 1, 2)
    assert layer.window == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_block": 5}, "compress_stride=2 must divide compress_block, got 5; nearest: 4, 6"),
        ({"select_block": 7}, "compress_stride=2 must divide select_block, got 7; nearest: 6, 8"),
        ({"select_block": 2}, "select_block must be at least 4, got 2"),
        ({"num_selected": 2}, "num_selected must be at least 3, got 2"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"num_local": 0}, "num_local must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message, make_layer):
    with pytest.raises(ValueError, match=message):
        make_layer(NSA, dim=M, **SMALL | change)
