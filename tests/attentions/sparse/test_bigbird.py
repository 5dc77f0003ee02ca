"""BigBird against a loop over the blocks that its graph names, and the graph itself."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.sparse import _selection
from attentions.sparse.bigbird import BigBird

B, M, H = 2, 30, 6
SMALL = {"block_size": 3, "num_window_blocks": 3, "num_global_blocks": 1, "num_random_blocks": 2}


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def neighbours(layer, g, i, num_blocks):
    """Blocks that query block i of key-value head g reads, from the definition."""
    half = layer.num_window_blocks if layer.spec.causal else layer.num_window_blocks // 2
    ends = set(range(layer.num_global_blocks))
    if layer.spec.causal:
        fixed = {j for j in range(i + 1) if i - j < half or j in ends}
        rest = set(range(i + 1)) - fixed
    else:
        ends = {j for j in range(num_blocks) if j in ends or num_blocks - 1 - j in ends}
        if i in ends:
            return set(range(num_blocks))
        fixed = {j for j in range(num_blocks) if abs(i - j) <= half or j in ends}
        rest = set(range(num_blocks)) - fixed
    drawn = sorted(rest, key=lambda j: -int(layer.order[g, i, j]))[: layer.num_random_blocks]
    return fixed | set(drawn)


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_global_blocks", [0, 1, 2])
def test_a_query_reads_the_band_the_ends_and_the_random_blocks(
    num_global_blocks, causal, num_kv_heads, form, make_layer, agree, softmax_over
):
    keywords = SMALL | {"num_global_blocks": num_global_blocks}
    layer = make_layer(BigBird, dim=M, causal=causal, num_kv_heads=num_kv_heads, **keywords)
    length = 25 if causal else 23  # eight or nine blocks, the last one short
    x, size = stream(length), layer.block_size
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(2)) > 0.3

    def allowed(b, h, t, q, k):
        blocks = neighbours(layer, h * num_kv_heads // H, t // size, math.ceil(length / size))
        return [j for j in range(t + 1 if causal else length) if j // size in blocks and mask[b, j]]

    agree(lambda: layer(x, key_mask=mask), lambda: softmax_over(layer, x, x, allowed), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_sequence_of_a_few_blocks_gets_softmax_attention(length, causal, make_layer):
    x = stream(length)
    layer, softmax = make_layer(BigBird, dim=M, causal=causal, **SMALL), make_layer(Softmax, dim=M, causal=causal)
    layer.load_state_dict(softmax.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), softmax(x))
    if length == 7:  # three blocks
        x = stream(30)
        assert not torch.allclose(layer(x), softmax(x))


def test_the_graph_does_not_depend_on_the_length_and_differs_between_heads():
    layer = BigBird(LayerSpec(dim=M, num_heads=H, causal=True, max_length=90), **SMALL)
    long, short = layer.blocks(30), layer.blocks(11)
    assert torch.equal(long[:, :, :11], short)
    rows = [set(map(int, row)) for row in long[0, :, 25]]
    assert len({frozenset(row) for row in rows}) > 1
    assert all({0, 23, 24, 25} <= row and len(row) == 6 and max(row) == 25 for row in rows)
    noncausal = BigBird(LayerSpec(dim=M, num_heads=H, causal=False, max_length=90), **SMALL)
    for num_blocks in (11, 30):
        for g in range(H):
            row = noncausal.blocks(num_blocks)[0, g, 5].tolist()
            assert {0, 4, 5, 6, num_blocks - 1} <= set(row) and len(set(row) - {-1}) == 7 and max(row) < num_blocks


def test_another_seed_draws_another_graph_and_the_state_dict_carries_it():
    spec = LayerSpec(dim=M, num_heads=H, causal=False, max_length=90)
    layers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers.append(BigBird(spec, **SMALL))
    assert not torch.equal(layers[0].blocks(30), layers[1].blocks(30))
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[0].blocks(30), layers[1].bfloat16().blocks(30))


def test_settings_that_make_no_graph_are_refused(make_layer):
    for name, least in {
        "block_size": 1,
        "num_window_blocks": 1,
        "num_global_blocks": 0,
        "num_random_blocks": 0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
            make_layer(BigBird, dim=M, **{name: least - 1})
    with pytest.raises(ValueError, match=r"num_window_blocks must be odd when noncausal, got 4; nearest: 3, 5"):
        make_layer(BigBird, dim=M, causal=False, num_window_blocks=4)
    layer = BigBird(LayerSpec(dim=M, num_heads=H, causal=True, max_length=12), **SMALL)
    with pytest.raises(ValueError, match="drawn for max_length=12, got at least 13 positions"):
        layer(torch.zeros(1, 13, M))
