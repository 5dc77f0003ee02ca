"""LSH attention against sets of positions: buckets, chunks and one softmax over the union of all rounds."""

import dataclasses

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.sparse.reformer import Reformer

B, T, M, H, CHUNK, HASHES = 2, 17, 12, 4, 5, 3


@pytest.fixture
def make(make_layer):
    def build(*, causal, num_kv_heads=H, max_length=T, **keywords):
        keywords = {"chunk_size": CHUNK, "num_hashes": HASHES, **keywords}
        spec = make_layer(Reformer, dim=M, num_heads=H, causal=causal, num_kv_heads=num_kv_heads, **keywords).spec
        torch.manual_seed(0)
        return Reformer(dataclasses.replace(spec, max_length=max_length), **keywords).double().eval()

    return build


def stream():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def buckets(layer, q, head):
    """h(x) = argmax [x R; -x R] of each position in each round: rounds of lists."""
    turned = [q @ layer.rotations[head, :, r] for r in range(layer.num_hashes)]
    return [[int(torch.cat([row, -row]).argmax()) for row in rows] for rows in turned]


def readable(layer, hashed, real, i):
    """P_i without i: the union over the rounds."""
    found, length, m = set(), len(real), layer.chunk_size
    for bucket in hashed:
        order = sorted((j for j in range(length) if real[j]), key=lambda j: (bucket[j], j))
        if layer.spec.causal:
            found |= set([j for j in order if bucket[j] == bucket[i] and j < i][-m:])
        elif i in order:
            chunk = {j: place // m for place, j in enumerate(order)}
            found |= {j for j in order if bucket[j] == bucket[i] and chunk[i] - chunk[j] in (0, 1)}
    return sorted(found - {i})


def naive(layer, x, real=None):
    width, rows = M // H, []
    real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
    for b in range(x.shape[0]):
        heads = []
        for h in range(H):
            g = h * layer.spec.kv_heads // H
            q = x[b] @ layer.qk_proj.weight[h * width : (h + 1) * width].T
            v = x[b] @ layer.v_proj.weight[g * width : (g + 1) * width].T
            k = q / q.square().sum(-1, keepdim=True).sqrt()
            hashed, reads = buckets(layer, q.detach(), h), []
            for i in range(x.shape[1]):
                keys = readable(layer, hashed, real[b], i)
                weights = [torch.exp(q[i] @ k[j]) for j in keys]
                read = sum(w * v[j] for w, j in zip(weights, keys, strict=True))
                reads.append(read / sum(weights) if keys else v[i] * real[b, i])
            heads.append(torch.stack(reads))
        rows.append(torch.cat(heads, dim=-1) @ layer.out_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("chunk_size", "num_hashes", "num_kv_heads"),
    [(5, 3, 4), (2, 3, 4), (2, 1, 2), (40, 2, 2)],  # under a mask, in chunks, in chunks, a chunk holds everything
)
def test_rounds_together_are_one_softmax_over_their_union(chunk_size, num_hashes, causal, num_kv_heads, make, agree):
    layer = make(causal=causal, chunk_size=chunk_size, num_hashes=num_hashes, num_kv_heads=num_kv_heads)
    x = stream()
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_size", [5, 2])  # under a mask, in chunks
def test_masked_positions_are_read_by_nobody_and_take_no_place(chunk_size, causal, make):
    layer, x = make(causal=causal, chunk_size=chunk_size), stream()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    got, want = layer(x, key_mask=mask), naive(layer, x, mask)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-9, atol=1e-10)  # float64
    short = x[:1, :9]
    padded = torch.cat([short, 9 * x[:1, 9:]], dim=1)
    torch.testing.assert_close(layer(padded, key_mask=(torch.arange(T) < 9)[None])[:, :9], layer(short))


def test_a_token_reads_itself_only_where_nothing_else_is_to_be_read(make):
    layer, x = make(causal=True), stream()
    torch.testing.assert_close(layer(x)[:, 0], x[:, 0] @ (layer.out_proj.weight @ layer.v_proj.weight).T)
    same = x[:, :1].expand(-1, 2, -1).clone().requires_grad_()
    values = torch.autograd.grad(layer.v_proj(same).sum() + layer(same)[:, 1].sum(), same)[0]
    alone = torch.autograd.grad(layer.v_proj(same).sum(), same)[0]
    assert not torch.allclose(values[:, 0], alone[:, 0])  # one bucket: position 1 reads position 0
    torch.testing.assert_close(values[:, 1], alone[:, 1])  # and not itself, whatever its score


def published_causal(layer, x):
    """The published form: chunks of the sort of all positions, the future masked inside them."""
    outputs = []
    for i in range(x.shape[1]):
        q = x[0] @ layer.qk_proj.weight[: M // H].T
        noncausal = Reformer(dataclasses.replace(layer.spec, causal=False), chunk_size=2, num_hashes=1)
        hashed = buckets(layer, q.detach(), 0)
        outputs.append([j for j in readable(noncausal, hashed, [True] * x.shape[1], i) if j < i])
    return outputs


def test_chunks_of_all_positions_would_look_ahead(make):
    layer, x = make(causal=True, chunk_size=2, num_hashes=1, max_length=3), stream()
    later = torch.cat([x[:, :12], -x[:, 12:]], dim=1)
    assert published_causal(layer, x)[:12] != published_causal(layer, later)[:12]
    torch.testing.assert_close(layer(x)[:, :12], layer(later)[:, :12], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prompt", [1, 9])
def test_decoding_equals_all_at_once(prompt, make):
    layer, x = make(causal=True, num_kv_heads=2), stream()
    want = layer(x)
    output, state = layer.prefill(x[:, :prompt])
    torch.testing.assert_close(output, want[:, :prompt])
    for t in range(prompt, T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    assert state.nbytes == B * T * (8 * (M + M // 2) + 4 * H * HASHES)


def test_buckets_follow_from_the_slot_and_three_projections_do(make):
    assert make(causal=True).rotations.shape == (
        H,
        M // H,
        HASHES,
        4,
    )  # 8 buckets of about 2 of 17 positions, chunks of 5
    layer = make(causal=True, max_length=1)
    assert layer.rotations.shape[-1] == 1
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * M * M


def test_rotations_are_new_in_training_and_kept_in_eval_mode(make):
    layer, x = make(causal=False), stream()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_bad_values_and_cross_attention_are_refused():
    spec = LayerSpec(dim=M, num_heads=H, causal=False)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Reformer(spec, chunk_size=0)
    with pytest.raises(ValueError, match="num_hashes must be at least 1, got 0"):
        Reformer(spec, chunk_size=4, num_hashes=0)
    with pytest.raises(UnsupportedPattern, match="queries are their own keys"):
        Reformer(dataclasses.replace(spec, cross=True), chunk_size=4)
