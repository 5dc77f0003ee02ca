"""The executor of sparse attention against a loop over the keys that each query may read, in both of its forms."""

import math

import pytest
import torch

from attentions.sparse import _selection
from attentions.sparse._selection import (
    Selection,
    chosen,
    largest,
    masked_logsumexp,
    merge,
    nearby,
    sparse_attention,
    sparse_attention_lse,
)

B, T, S, H, G, K, V = 2, 9, 13, 6, 3, 5, 7


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)
    return request.param


def heads(length=T, keys=S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, length, H, K), (B, keys, G, K), (B, keys, G, V)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def some_blocks(rows, num_blocks, most, *, batch=B, num_heads=H, seed=1):
    """Up to `most` different blocks in each row, in any order, with a -1 here and there."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(batch, num_heads, rows, num_blocks, generator=generator).argsort(-1)[..., :most]
    return blocks.masked_fill(torch.rand(blocks.shape, generator=generator) < 0.2, -1)


def naive(q, k, v, selection, key_mask=None):
    """Outputs and log-sum-exps, key by key."""
    outputs, sums = [], []
    for b in range(B):
        for t in range(q.shape[1]):
            for h in range(H):
                g, blocks = h * G // H, selection.blocks
                row = blocks[b % len(blocks), h * blocks.shape[1] // H, t // selection.query_block].tolist()
                keys, here = [], selection.start + t
                for j in range(k.shape[1]):
                    if j // selection.block_size not in row or (key_mask is not None and not key_mask[b, j]):
                        continue
                    if selection.causal and j > here:
                        continue
                    if selection.window is not None and abs(j - here) >= selection.window:
                        continue
                    keys.append(j)
                weights = [torch.exp(q[b, t, h] @ k[b, j, g] / math.sqrt(K)) for j in keys]
                total = sum(weights) if keys else torch.zeros((), dtype=q.dtype)
                read = sum(w * v[b, j, g] for w, j in zip(weights, keys, strict=True)) if keys else 0 * v[b, 0, g]
                outputs.append(read / total if keys else read)
                sums.append(total.log())
    return torch.stack(outputs).view(B, -1, H, V), torch.stack(sums).view(B, -1, H)


@pytest.mark.parametrize("num_heads", [1, G, H])
@pytest.mark.parametrize(
    "keywords",
    [
        {"block_size": 1},
        {"block_size": 3},
        {"block_size": 3, "causal": True},
        {"block_size": 4, "query_block": 5, "causal": True, "start": 3},
        {"block_size": 5, "query_block": 4, "window": 4},
        {"block_size": 20, "window": 3, "causal": True},
    ],
    ids=str,
)
def test_a_query_reads_the_keys_of_its_blocks_and_nothing_else(keywords, num_heads, form, agree):
    rows, num_blocks = -(-T // keywords.get("query_block", 1)), -(-S // keywords["block_size"])
    q, k, v = heads()
    for batch, mask in ((B, None), (1, torch.rand(B, S, generator=torch.Generator().manual_seed(2)) > 0.3)):
        blocks = some_blocks(rows, num_blocks, min(3, num_blocks), batch=batch, num_heads=num_heads)
        selection = Selection(blocks, **keywords)
        agree(
            lambda mask=mask, selection=selection: sparse_attention(q, k, v, selection, key_mask=mask),
            lambda mask=mask, selection=selection: naive(q, k, v, selection, mask)[0],
            [q, k, v],
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 4, 6, 9, 20])
def test_a_window_lies_in_the_own_block_and_its_neighbours(window, causal, form):
    q, k, v = heads(keys=T)
    everything = Selection(torch.zeros(1, 1, T, 1, dtype=torch.long), T, causal=causal, window=window)
    selection = nearby(T, window, causal=causal, device=q.device)
    torch.testing.assert_close(sparse_attention(q, k, v, selection), naive(q, k, v, everything)[0])


def test_log_sum_exps_carry_gradients_and_are_minus_infinity_without_a_key(form, agree):
    q, k, v = heads()
    blocks = some_blocks(T, 5, 2)
    blocks[:, :, 4] = -1  # nothing chosen
    selection = Selection(blocks, 3, causal=True)
    output, lse = sparse_attention_lse(q, k, v, selection)
    torch.testing.assert_close(lse, naive(q, k, v, selection)[1])
    empty = lse == -math.inf
    assert empty[:, 4].all() and not empty.all()
    assert not output[empty].any()
    torch.testing.assert_close(output, sparse_attention(q, k, v, selection))
    agree(
        lambda: sparse_attention_lse(q, k, v, selection)[1].masked_fill(empty, 0.0),
        lambda: naive(q, k, v, selection)[1].masked_fill(empty, 0.0),
        [q, k],
    )


def test_merging_disjoint_parts_is_attention_over_their_union(form, agree):
    q, k, v = heads()
    parts = [
        Selection(blocks, 3, causal=True) for blocks in (torch.tensor([[[[0, 2]]]]), torch.tensor([[[[1, 4, 3]]]]))
    ]
    parts = [Selection(part.blocks.expand(1, 1, T, -1), 3, causal=True) for part in parts]
    union = Selection(torch.cat([part.blocks for part in parts], dim=-1), 3, causal=True)
    nothing = Selection(torch.full((1, 1, T, 1), -1), 3)
    mask = torch.arange(S).expand(B, -1) >= torch.tensor(
        [[2], [0]]
    )  # the first queries of row 0 see no key in any part

    def merged():
        return merge([sparse_attention_lse(q, k, v, part, key_mask=mask) for part in (*parts, nothing)])

    agree(lambda: merged()[0], lambda: naive(q, k, v, union, mask)[0], [q, k, v])
    torch.testing.assert_close(merged()[1], naive(q, k, v, union, mask)[1])


def test_merging_parts_without_a_key_has_finite_gradients():
    lse = torch.full((1, 2, 1, 2), -math.inf, dtype=torch.float64)
    lse[:, 1, :, 0] = 0.5
    lse.requires_grad_()
    output, total = merge([(torch.ones(1, 2, 1, 3, dtype=torch.float64), lse[..., part]) for part in (0, 1)])
    assert output[0, :, 0, 0].tolist() == [0.0, 1.0] and total[0, :, 0].tolist() == [-math.inf, 0.5]
    (output.sum() + total[:, 1].sum()).backward()
    assert lse.grad.isfinite().all()


def test_a_static_mask_becomes_its_list_of_blocks():
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    blocks = chosen(mask)
    assert blocks.shape == (1, 1, 5, int(mask.sum(-1).max()))
    for row, listed in zip(mask, blocks[0, 0], strict=True):
        assert [int(b) for b in listed if b >= 0] == row.nonzero().flatten().tolist()
    assert chosen(mask, most=2).shape[-1] == 2


def test_of_equal_scores_the_first_is_chosen_and_minus_infinity_never():
    scores = torch.tensor([[1.0, 3.0, 3.0, 1.0], [-math.inf, 0.0, -math.inf, -math.inf]]).repeat(1, 50)
    assert largest(scores, 3).tolist() == [[1, 2, 5], [1, 5, 9]]
    assert largest(scores[:, :4], 3).tolist() == [[1, 2, 0], [1, -1, -1]]
    assert largest(scores[:, :4], 9).shape == (2, 4)


def test_dropout_drops_weights_and_keeps_their_expectation(form):
    q, k, v = heads()
    selection = Selection(some_blocks(T, 5, 3), 3)
    torch.manual_seed(0)
    draws = torch.stack([sparse_attention(q, k, v, selection, dropout=0.3) for _ in range(300)])
    want = sparse_attention(q, k, v, selection)
    assert not torch.allclose(draws[0], want)
    torch.testing.assert_close(draws.mean(0), want, rtol=0, atol=0.3)  # 300 draws of size 1 err by 0.06


def test_low_precision_gives_its_own_dtype_and_float32_sums(form):
    q, k, v = (x.bfloat16() for x in heads())
    output, lse = sparse_attention_lse(q, k, v, Selection(some_blocks(T, 5, 3), 3))
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    want = naive(q.double(), k.double(), v.double(), Selection(some_blocks(T, 5, 3), 3))
    torch.testing.assert_close(output.double(), want[0], rtol=0, atol=0.05)


def test_what_is_not_visible_does_not_count_in_a_log_sum_exp():
    scores = torch.tensor([[1.0, -math.inf], [5.0, 7.0]], dtype=torch.float64)
    visible = torch.tensor([[True, False], [False, False]])
    assert masked_logsumexp(scores, visible).tolist() == [1.0, -math.inf]
