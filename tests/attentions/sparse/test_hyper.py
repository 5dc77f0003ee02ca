"""HyperAttention against sums over keys: 1 for each of a block of sorted keys, M / m for each sample of others."""

import dataclasses
import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.dense.softmax import Softmax
from attentions.sparse.hyper import HyperAttention, HyperAttentionOfficial

B, M, H, BLOCK, SAMPLES, BITS, LEAF = 2, 12, 6, 3, 4, 5, 7
SMALL = {"block_size": BLOCK, "num_samples": SAMPLES, "num_hash_bits": BITS, "min_seq_len": LEAF}


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reflected(bits):
    """Gray's sequence: that of one bit less, then the same backwards with a further bit set."""
    if bits == 0:
        return [0]
    half = reflected(bits - 1)
    return half + [code + 2 ** (bits - 1) for code in reversed(half)]


def hashed(layer, vector):
    code = sum(2**r for r in range(BITS) if vector @ layer.directions[:, r] > 0)
    sequence = reflected(BITS)
    return sequence[code] if isinstance(layer, HyperAttentionOfficial) else sequence.index(code)


def approximate(layer, g, queries, keys, by_rank):
    """Weights {query: {key: weight}}; queries and keys: {position: hash}."""
    official = isinstance(layer, HyperAttentionOfficial)
    order = sorted(keys, key=lambda j: (keys[j], j))
    blocks = max(1, math.ceil(len(order) / BLOCK))
    width = max(1, math.ceil(len(queries) / blocks))
    ranked = sorted(queries, key=lambda i: (queries[i], i))
    found = {}
    for i, value in queries.items():
        if by_rank or official:
            block = ranked.index(i) // width
        else:
            below, same = (sum(keys[j] < value for j in order), sum(keys[j] == value for j in order))
            block = min((below + below + same) // 2 // BLOCK, blocks - 1)
        near = order[block * BLOCK : (block + 1) * BLOCK]
        weights = dict.fromkeys(near, 1.0)
        for draw in layer.draws[g].tolist() if order else ():
            j = order[draw * len(order) // 2**31]
            if j not in near or official:
                weights[j] = weights.get(j, 0.0) + len(order) / SAMPLES
        found[i] = weights
    return found


def halved(layer, g, queries, keys, first, last):
    """The published recursion over positions first ... last - 1."""
    if last - first <= LEAF:
        return {i: {j: 1.0 for j in keys if first <= j <= i} for i in queries if first <= i < last}
    middle = (first + last) // 2
    weights = {**halved(layer, g, queries, keys, first, middle), **halved(layer, g, queries, keys, middle, last)}
    later = {i: queries[i] for i in queries if middle <= i < last}
    earlier = {j: keys[j] for j in keys if first <= j < middle}
    for i, far in approximate(layer, g, later, earlier, False).items():
        weights[i] = {**far, **weights[i]}
    return weights


def naive(layer, x, source, mask=None):
    spec, width, rows = layer.spec, M // H, []
    top = LEAF
    while top < x.shape[1]:
        top *= 2
    for b in range(B):
        heads = []
        for h in range(H):
            g = h * spec.kv_heads // H
            q = x[b] @ layer.q_proj.weight[h * width : (h + 1) * width].T
            k, v = (source[b] @ p.weight[g * width : (g + 1) * width].T for p in (layer.k_proj, layer.v_proj))
            real = [j for j in range(len(k)) if mask is None or mask[b, j]]
            asking = range(len(q)) if spec.cross else real
            queries = {i: hashed(layer, q[i]) for i in asking}
            keys = {j: hashed(layer, k[j]) for j in real}
            if spec.causal and not spec.cross:
                weights = halved(layer, g, queries, keys, 0, top)
            else:
                weights = approximate(layer, g, queries, keys, not spec.causal)
            reads = []
            for i in range(len(q)):
                terms = [(w * torch.exp(q[i] @ k[j] / math.sqrt(width)), v[j]) for j, w in weights.get(i, {}).items()]
                total = sum(term for term, _ in terms)
                reads.append(sum(term / total * value for term, value in terms) if terms else 0.0 * v[0])
            heads.append(torch.stack(reads))
        rows.append(torch.cat(heads, dim=-1) @ layer.out_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [HyperAttention, HyperAttentionOfficial])
@pytest.mark.parametrize(
    ("causal", "cross", "num_kv_heads", "masked", "length"),
    [
        (True, False, 2, False, 31),  # 7, 7, 14 and 3: a ragged end
        (True, False, 6, True, 29),
        (False, False, 6, False, 17),
        (False, False, 2, True, 17),
        (False, True, 2, False, 17),
        (True, True, 6, True, 17),
        (True, True, 3, False, 13),
    ],
)
def test_a_block_and_a_weighed_sample(causal, cross, num_kv_heads, masked, length, kind, make_layer, agree):
    keywords = {"causal": causal, "cross": cross, "num_kv_heads": num_kv_heads, **SMALL}
    layer = make_layer(kind, dim=M, num_heads=H, **keywords).eval()
    x, context = stream(11 if cross else length), (stream(length, seed=2),) if cross else ()
    source, mask = context[0] if cross else x, None
    if masked:
        mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.4
        mask[0, :5] = False
    kept = slice(None) if cross or mask is None else mask  # a masked query is nobody's business
    agree(
        lambda: layer(x, *context, key_mask=mask)[kept],
        lambda: naive(layer, x, source, mask)[kept],
        [x, *context, *layer.parameters()],
    )


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [HyperAttention, HyperAttentionOfficial])
def test_a_block_of_all_keys_or_a_short_sequence_is_softmax_attention(kind, causal, cross, make_layer):
    x, context = stream(17), (stream(17, seed=2),) if cross else ()
    softmax = make_layer(Softmax, dim=M, num_heads=H, causal=causal, cross=cross)
    for change in ({"block_size": 17, "min_seq_len": 2}, {"min_seq_len": 18}):
        layer = make_layer(kind, dim=M, num_heads=H, causal=causal, cross=cross, **{**SMALL, **change})
        softmax.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(x, *context), softmax(x, *context))


@pytest.mark.parametrize("kind", [HyperAttention, HyperAttentionOfficial])
def test_samples_make_an_unbiased_denominator_unless_own_block_samples_count(kind, make_layer):
    layer = make_layer(kind, dim=M, num_heads=H, causal=False, **SMALL).train()
    copies, (q, k, v) = 3_000, (0.7 * torch.randn(1, 11, H, 2, dtype=torch.float64) for _ in range(3))
    many = [x.expand(copies, -1, -1, -1) for x in (q, k, v)]
    order = layer.hashes(k).argsort(dim=1, stable=True)
    hashes = layer.hashes(k).gather(1, order).expand(copies, -1, -1)
    place = order[..., None].expand(-1, -1, -1, 2)
    torch.manual_seed(0)
    _, total = layer._approximate(
        many[0], layer.hashes(many[0]), *(x.gather(1, place.expand(copies, -1, -1, -1)) for x in many[1:]), hashes
    )
    scores = (torch.einsum("thd,shd->hts", q[0], k[0].gather(0, place[0])) / math.sqrt(2)).exp()
    want = scores.sum(-1)
    if kind is HyperAttentionOfficial:
        rank = layer.hashes(q)[0].T.argsort(dim=-1, stable=True).argsort(-1)
        block = rank // math.ceil(11 / 4)  # four blocks, the last of two keys
        own = torch.arange(11) // BLOCK == block[..., None]
        want = want + (scores * own).sum(-1)
    error = total.exp().std(0) / math.sqrt(copies)
    deviation = (total.exp().mean(0).T - want) / error.T
    assert deviation.abs().max() < 4.5  # standard errors, 66 numbers
    assert error.max() < 0.03 * want.min()


@pytest.mark.parametrize("kind", [HyperAttention, HyperAttentionOfficial])
@pytest.mark.parametrize("causal", [True, False])
def test_weights_sum_to_one(causal, kind, make_layer):
    layer = make_layer(kind, dim=M, num_heads=H, causal=causal, **SMALL)
    q, k = (torch.randn(B, 31, H, 2, dtype=torch.float64) for _ in "qk")
    ones = torch.ones(B, 31, H, 2, dtype=torch.float64)
    torch.testing.assert_close(layer.attend(q, k, ones), ones)
    low = layer.attend(q, k, torch.rand(B, 31, H, 2, dtype=torch.float64))
    assert low.min() > 0 and low.max() < 1


def test_the_published_causal_form_looks_ahead_and_ours_does_not(make_layer):
    moved = {}
    for kind in (HyperAttention, HyperAttentionOfficial):
        layer, x = make_layer(kind, dim=M, num_heads=H, **{**SMALL, "min_seq_len": 8}).eval(), stream(64)
        base, moved[kind] = layer(x), 0
        for t in range(0, 63, 2):
            other = torch.cat([x[:, : t + 1], 3 * stream(63 - t, seed=5)], dim=1)
            moved[kind] += not torch.allclose(layer(other)[:, : t + 1], base[:, : t + 1], rtol=1e-9, atol=1e-9)
    assert moved[HyperAttention] == 0 and moved[HyperAttentionOfficial] > 10


def test_neighbouring_ranks_differ_in_one_sign_where_the_released_hash_takes_the_code_itself(make_layer):
    signs = 2.0 * ((torch.arange(128)[:, None] >> torch.arange(7)) & 1) - 1
    distances = {}
    for kind in (HyperAttention, HyperAttentionOfficial):
        layer = make_layer(kind, dim=14, num_heads=2, num_hash_bits=7)
        layer.directions.copy_(torch.eye(7))
        order = layer.hashes(signs.double()[None, :, None])[0, :, 0].argsort()
        distances[kind] = (signs[order[1:]] != signs[order[:-1]]).sum(-1).double()
    assert distances[HyperAttention].eq(1).all()
    assert distances[HyperAttentionOfficial].mean().item() == pytest.approx(1.31, abs=0.005)
    assert distances[HyperAttentionOfficial].max() == 4


def test_the_state_holds_keys_sorted_within_doublings_and_a_hash_each(make_layer):
    layer, x = make_layer(HyperAttention, dim=M, num_heads=H, num_kv_heads=2, rotary_base=100.0, **SMALL), stream(45)
    want = layer.eval()(x)
    output, state = layer.prefill(x[:, :16])
    torch.testing.assert_close(output, want[:, :16])
    for t in range(16, 45):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    for first, last in ((0, 28), (28, 42)):  # 7 times 4 and 2; 3 positions in their order
        assert state.hashes[:, first:last].diff(dim=1).ge(0).all()
    assert state.nbytes == B * 45 * 2 * (2 * 2 * 8 + 4)
    with pytest.raises(UnsupportedPattern, match="no decode state: its blocks need the sort of all queries"):
        make_layer(HyperAttentionOfficial, dim=M, num_heads=H).init_state(1)


def test_samples_are_new_in_training_and_kept_in_eval_mode(make_layer):
    layer, x = make_layer(HyperAttention, dim=M, num_heads=H, causal=False, **SMALL), stream(17)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    assert layer.to(torch.bfloat16).draws.dtype == torch.int32


def test_the_published_defaults_and_bad_values(make_layer):
    layer = make_layer(HyperAttention)
    assert (layer.block_size, layer.num_samples, layer.num_hash_bits, layer.min_seq_len) == (256, 256, 7, 4096)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 60 * 60
    spec = LayerSpec(dim=M, num_heads=H, causal=True)
    for name in SMALL:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            HyperAttention(dataclasses.replace(spec), **{name: 0})
    with pytest.raises(ValueError, match="num_hash_bits must be at most 30, got 31"):
        HyperAttention(spec, num_hash_bits=31)
