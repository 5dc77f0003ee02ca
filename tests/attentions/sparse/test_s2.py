"""S2-Attention against the authors' rule for blocks, and decoding with the shards that it keeps."""

import math

import pytest
import torch

from attentions.dense.softmax import Softmax
from attentions.sparse import _selection
from attentions.sparse.s2 import S2Attention

B, T, S, M, H, SIZE, LOCAL = 2, 23, 17, 30, 6, 2, 2


def stream(length=T, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)


def rule(layer, num_keys, mask=None):
    """Keys of a query from the blocks i and j, as one would write the mask down."""
    spec, v = layer.spec, layer.stride
    step = 1 if spec.kv_heads >= v else v // spec.kv_heads

    def block(g, i, j):
        if layer.homo_head:
            g = 0
        if g >= spec.kv_heads - layer.num_dense_heads:
            return True
        if spec.cross:
            return (j + g * step) % v == 0
        stripe = (j + g * step) % v == 0 if spec.causal else (j - i + g * step) % v == 0
        return abs(i - j) < LOCAL or stripe

    def allowed(b, h, t, q, k):
        g = h * spec.kv_heads // H
        keys = [j for j in range(num_keys) if block(g, t // SIZE, j // SIZE)]
        keys = [j for j in keys if spec.cross or not spec.causal or j <= t]
        return [j for j in keys if mask is None or mask[b, j]]

    return allowed


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    ("num_kv_heads", "stride", "more"),
    [(6, 4, {}), (2, 5, {}), (3, 7, {"num_dense_heads": 1}), (6, 3, {"homo_head": True})],
)
def test_a_head_reads_its_stripe_and_the_local_blocks(
    num_kv_heads, stride, more, cross, causal, form, make_layer, agree, softmax_over
):
    sizes = {"block_size": SIZE, "num_local_blocks": LOCAL, "stride": stride, **more}
    layer = make_layer(S2Attention, dim=M, causal=causal, cross=cross, num_kv_heads=num_kv_heads, **sizes)
    x, context = stream(), stream(S, seed=2) if cross else None
    source = context if cross else x
    mask = torch.rand(B, source.shape[1], generator=torch.Generator().manual_seed(3)) > 0.3
    agree(
        lambda: layer(x, context),
        lambda: softmax_over(layer, x, source, rule(layer, source.shape[1])),
        [*([x, source] if cross else [x]), *layer.parameters()],
    )
    torch.testing.assert_close(
        layer(x, context, key_mask=mask), softmax_over(layer, x, source, rule(layer, source.shape[1], mask))
    )


@pytest.mark.parametrize("causal", [True, False])
def test_all_heads_together_read_every_block_when_there_are_as_many_as_the_stride(causal, make_layer):
    blocks = torch.arange(31)
    for groups, stride, covered in ((6, 5, True), (6, 6, True), (2, 2, True), (2, 4, False)):
        layer = make_layer(S2Attention, dim=M, causal=causal, num_kv_heads=groups, stride=stride, num_local_blocks=1)
        seen = layer.reads(blocks[:, None], blocks).any(0)
        allowed = torch.ones(31, 31, dtype=torch.bool)
        assert torch.equal(seen, allowed.tril() if causal else allowed) == covered
    layer = make_layer(S2Attention, dim=M, causal=causal, stride=5, num_local_blocks=1, homo_head=True)
    assert not layer.reads(blocks[:, None], blocks).any(0)[30].all(), "one stripe for all does not cover"


@pytest.mark.parametrize("sizes", [{"stride": 1}, {"stride": 5, "num_local_blocks": 12}, {"num_dense_heads": 6}])
@pytest.mark.parametrize("causal", [True, False])
def test_stride_one_or_local_or_dense_throughout_is_softmax(causal, sizes, make_layer):
    layer, x = make_layer(S2Attention, dim=M, causal=causal, block_size=SIZE, **sizes), stream()
    torch.testing.assert_close(layer(x), make_layer(Softmax, dim=M, causal=causal)(x))


@pytest.mark.parametrize(("num_kv_heads", "more"), [(6, {}), (3, {"num_dense_heads": 1})])
def test_decoding_drops_what_no_query_will_read(num_kv_heads, more, make_layer):
    sizes = {"block_size": SIZE, "num_local_blocks": LOCAL, "stride": 4, **more}
    layer, x = make_layer(S2Attention, dim=M, num_kv_heads=num_kv_heads, **sizes), stream(41)
    want, (output, state) = layer(x), layer.prefill(x[:, :11])
    torch.testing.assert_close(output, want[:, :11])
    for t in range(11, 41):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.nbytes == 2 * B * layer.state_bytes(t + 1)  # float64
    for g, k in enumerate(state.k):
        dense = g >= num_kv_heads - layer.num_dense_heads
        # position 40: blocks 19 and 20 (one position of it) are local, of the other 19 every fourth is kept
        step = max(1, 4 // num_kv_heads)
        assert k.shape[1] == (41 if dense else 3 + 2 * sum((j + g * step) % 4 == 0 for j in range(19)))
        assert k.untyped_storage().nbytes() == k.nbytes, "a view keeps the dropped positions alive"


def test_a_context_is_kept_as_far_as_a_stripe_reads_it(make_layer):
    layer = make_layer(S2Attention, dim=M, cross=True, block_size=SIZE, stride=4)
    x, context = stream(5), stream(S, seed=2)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.4
    for key_mask in (None, mask):
        k, v = layer.key_value(context)
        state, cut = layer.init_memory(B, x), {} if key_mask is None else {"key_mask": mask[:, :7]}
        rest = {} if key_mask is None else {"key_mask": mask[:, 7:]}
        state = layer.update(layer.update(state, k[:, :7], v[:, :7], **cut), k[:, 7:], v[:, 7:], **rest)
        torch.testing.assert_close(layer.step(x[:, 1:2], state)[0], layer(x, context, key_mask=key_mask)[:, 1:2])
    assert [held.shape[1] for held in state.k] == [5, 4, 4, 4, 5, 4]  # blocks 0, 4, 8 (short) are of heads 0 and 4


def test_the_defaults_of_phi_3_small_and_bad_values(make_layer):
    layer = make_layer(S2Attention)
    assert (layer.block_size, layer.num_local_blocks, layer.stride) == (64, 16, 8)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 60 * 60
    for name in ("block_size", "num_local_blocks", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make_layer(S2Attention, **{name: 0})
    with pytest.raises(ValueError, match="num_dense_heads must be 0 to 3 key-value heads, got 4"):
        make_layer(S2Attention, num_kv_heads=3, num_dense_heads=4)
    with pytest.raises(ValueError, match="homo_head makes all heads alike, got num_dense_heads=1; nearest: 0"):
        make_layer(S2Attention, homo_head=True, num_dense_heads=1)
