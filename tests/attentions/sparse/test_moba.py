"""MoBA against gates computed block by block and softmax over the keys of the blocks that they choose."""

import math

import pytest
import torch

from attentions.sparse import _selection
from attentions.sparse.moba import MoBA

B, M, H, SIZE = 2, 30, 6, 3


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rule(layer, num_keys, mask=None):
    """The key positions of a query: q . mean(K) of each block, the own block first of all, then the largest."""
    causal = layer.spec.causal and not layer.spec.cross

    def allowed(b, h, t, q, k):
        g, own = h * layer.spec.kv_heads // H, None if layer.spec.cross else t // SIZE
        gates = {}
        for block in range(math.ceil(num_keys / SIZE)):
            keys = [j for j in range(block * SIZE, min(num_keys, (block + 1) * SIZE)) if mask is None or mask[b, j]]
            if keys and not (causal and block > own):
                gate = (q[b, t, h] @ k[b, keys, g].mean(0)).item()
                gates[block] = math.inf if block == own else gate
        blocks = sorted(gates, key=lambda block: (-gates[block], block))[: layer.top_k]
        keys = [j for j in range(num_keys) if j // SIZE in blocks and (mask is None or mask[b, j])]
        return [j for j in keys if j <= t] if causal else keys

    return allowed


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cross", [False, True])
def test_a_query_reads_the_blocks_with_the_largest_gates(
    cross, causal, num_kv_heads, form, make_layer, agree, softmax_over
):
    layer = make_layer(
        MoBA, dim=M, causal=causal, cross=cross, num_kv_heads=num_kv_heads, block_size=SIZE, top_k=2 if causal else 3
    )
    x, context = stream(8 if cross else 14), stream(14, seed=2) if cross else None
    source = context if cross else x
    tensors = [x, source] if cross else [x]
    random = torch.rand(B, source.shape[1], generator=torch.Generator().manual_seed(3)) > 0.4
    random[0, :4] = False  # a whole block, and queries without a key
    for mask in (None, random):
        agree(
            lambda mask=mask: layer(x, context, key_mask=mask),
            lambda mask=mask: softmax_over(layer, x, source, rule(layer, source.shape[1], mask)),
            [*tensors, *layer.parameters()],
        )


def test_the_own_block_counts_among_the_top_k(make_layer, softmax_over):
    layer, x = make_layer(MoBA, dim=M, block_size=SIZE, top_k=1), stream(11)
    want = softmax_over(layer, x, x, lambda b, h, t, q, k: list(range(t // SIZE * SIZE, t + 1)))
    torch.testing.assert_close(layer(x), want)


def test_of_equal_gates_the_earlier_blocks_are_chosen(make_layer, softmax_over):
    layer, x = make_layer(MoBA, dim=M, block_size=SIZE, top_k=3), stream(17)
    torch.nn.init.zeros_(layer.k_proj.weight)  # every gate is 0

    def first_two_and_own(b, h, t, q, k):
        return [j for j in range(t + 1) if j // SIZE in (0, 1, t // SIZE) or t // SIZE == 1]

    torch.testing.assert_close(layer(x), softmax_over(layer, x, x, first_two_and_own))


@pytest.mark.parametrize("cross", [False, True])
def test_the_state_holds_the_keys_the_values_and_a_mean_per_block(cross, make_layer):
    layer = make_layer(MoBA, dim=M, cross=cross, num_kv_heads=2, block_size=SIZE, top_k=2)
    x = stream(17)
    want = layer(x, x) if cross else layer(x)
    if cross:  # written in two parts, the first with a short block
        k, v = layer.key_value(x)
        state = layer.update(layer.init_memory(B, x), k[:, :7], v[:, :7])
        state = layer.update(state, k[:, 7:], v[:, 7:])
    else:
        output, state = layer.prefill(x[:, :7])
        torch.testing.assert_close(output, want[:, :7])
    for t in range(0 if cross else 7, 17):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    torch.testing.assert_close(state.means[:, 5], state.k[:, 15:17].mean(1))  # the last block is short
    assert state.nbytes == B * 8 * 2 * 5 * (17 + 17 + 6)


def test_the_published_defaults_and_sizes_below_one(make_layer):
    layer = make_layer(MoBA)
    assert (layer.block_size, layer.top_k) == (512, 3)
    for name in ("block_size", "top_k"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make_layer(MoBA, **{name: 0})
