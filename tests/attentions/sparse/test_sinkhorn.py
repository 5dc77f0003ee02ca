"""Sparse Sinkhorn attention against loops over blocks, positions and iterations."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.sparse.sinkhorn import Sinkhorn, balance

B, T, M, H, SIZE = 2, 13, 20, 4, 5
SMALL = {"dim": M, "num_heads": H}


def shares(layer, k, blocks, iterations, causal):
    """S as a dictionary (i, j) -> share, for the keys k [T, D] of one head; blocks: the known positions of each."""
    count = len(blocks)
    scores = {}
    for i in range(count):
        seen = [t for block in blocks for t in block if t <= i * SIZE] if causal else blocks[i]
        if seen:
            row = k[seen].mean(0) @ layer.sort_weight / layer.temperature
            for j in range(i if causal else count):
                if blocks[j]:
                    scores[i, j] = torch.exp(row[j])
    for _ in range(iterations):
        up_to = {
            (i, j): sum(scores[r, j] for r in range(i + 1 if causal else count) if (r, j) in scores) for i, j in scores
        }
        scores = {place: scores[place] / up_to[place] for place in scores}
        rows = {i: sum(scores[r, j] for r, j in scores if r == i) for i, _ in scores}
        scores = {(i, j): scores[i, j] / rows[i] for i, j in scores}
    return scores


def naive(layer, x, key_mask=None):
    width, causal, length = M // H, layer.spec.causal, x.shape[1]
    q, k, v = (x @ proj.weight.T for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    outputs = []
    for b in range(B):
        known = [t for t in range(length) if key_mask is None or key_mask[b, t]]
        blocks = [[t for t in known if t // SIZE == n] for n in range(math.ceil(length / SIZE))]
        heads = []
        for h in range(H):
            g = h * layer.spec.kv_heads // H
            own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
            keys, values = k[b, :, shared], v[b, :, shared]
            s = shares(layer, keys, blocks, layer.num_iterations, causal)
            rows = []
            for t in range(length):
                i = t // SIZE
                read = [(keys[j], values[j]) for j in blocks[i] if j <= t or not causal]
                for place in range(SIZE):
                    sources = [j for j in range(len(blocks)) if (i, j) in s and j * SIZE + place in blocks[j]]
                    if sources:
                        total = sum(s[i, j] for j in sources)
                        read.append(
                            tuple(
                                sum(s[i, j] * part[j * SIZE + place] for j in sources) / total
                                for part in (keys, values)
                            )
                        )
                if not read:
                    rows.append(torch.zeros(width, dtype=x.dtype))
                    continue
                near_keys, near_values = (torch.stack(part) for part in zip(*read, strict=True))
                weights = torch.exp(near_keys @ q[b, t, own] / math.sqrt(width))
                rows.append(weights @ near_values / weights.sum())
            heads.append(torch.stack(rows))
        outputs.append(torch.cat(heads, dim=-1))
    return torch.stack(outputs) @ layer.out_proj.weight.T


def mask_of():
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1, 3:11] = False  # a whole block, and the first key of one
    return mask


@pytest.mark.parametrize(("num_kv_heads", "masked"), [(4, False), (2, True)])
@pytest.mark.parametrize("causal", [False, True])
def test_each_block_reads_itself_and_the_sorted_block(causal, num_kv_heads, masked, make_layer, agree):
    layer = make_layer(
        Sinkhorn, block_size=SIZE, num_iterations=2, causal=causal, num_kv_heads=num_kv_heads, **SMALL
    ).eval()
    x, mask = torch.randn(B, T, M, dtype=torch.float64), mask_of() if masked else None
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_shorter_than_a_block_and_a_single_position(causal, make_layer):
    layer = make_layer(Sinkhorn, block_size=SIZE, causal=causal, **SMALL).eval()
    for length in (1, 4, 6):
        x = torch.randn(B, length, M, dtype=torch.float64)
        torch.testing.assert_close(layer(x), naive(layer, x))


def test_the_balance_is_doubly_stochastic():
    scores = 3 * torch.randn(2, 7, 7, dtype=torch.float64)
    s = balance(scores, torch.ones(7, 7, dtype=torch.bool), 200, causal=False).exp()
    torch.testing.assert_close(s.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    torch.testing.assert_close(s.sum(-2), torch.ones(2, 7, dtype=torch.float64))


def test_the_causal_balance_never_looks_at_later_rows():
    allowed = torch.ones(7, 7, dtype=torch.bool).tril(-1)
    scores = torch.randn(7, 7, dtype=torch.float64).masked_fill(~allowed, -1e9)
    whole = balance(scores, allowed, 7, causal=True)
    for n in range(1, 7):
        torch.testing.assert_close(balance(scores[:n, :n], allowed[:n, :n], 7, causal=True), whole[:n, :n])
    leaky = balance(scores, allowed, 7, causal=False)
    short = balance(scores[:6, :6], allowed[:6, :6], 7, causal=False)
    assert not torch.allclose(leaky[:6, :6], short), "whole columns show the future"
    rows = whole.exp().masked_fill(~allowed, 0.0).sum(-1)
    torch.testing.assert_close(rows, torch.tensor([0.0] + 6 * [1.0], dtype=torch.float64))


def test_noise_in_training_only(make_layer):
    layer, x = make_layer(Sinkhorn, block_size=SIZE, **SMALL), torch.randn(B, T, M, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_sorting_scores_have_one_column_per_block():
    spec = LayerSpec(dim=M, num_heads=H, causal=True, max_length=43)
    layer = Sinkhorn(spec, block_size=SIZE)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * M * M + M // H * 9
    layer(torch.randn(B, 45, M))
    with pytest.raises(ValueError, match="at most 9 blocks can be sorted, got 10: raise max_length"):
        layer(torch.randn(B, 46, M))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_mistakes_are_named(keywords, message, make_layer):
    with pytest.raises(ValueError, match=message):
        make_layer(Sinkhorn, **keywords)
