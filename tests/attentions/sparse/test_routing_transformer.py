"""The Routing Transformer against loops over clusters and tokens, and its centroids against k-means by hand."""

import math

import pytest
import torch

from attentions.base import UnsupportedPattern, auxiliary_losses, rotary
from attentions.sparse.routing_transformer import RoutingOfficial, RoutingTransformer

B, T, S, M, H, C, W = 2, 19, 13, 30, 6, 3, 4
SIZES = {"num_clusters": C, "cluster_window": W, "window": 5}


def stream(length=T, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sphere(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def heads_of(layer, x, source):
    """q, k, v [B, T or S, H, D], as each query head reads them; of the routing heads, q and k are on the sphere."""
    spec, R, repeats = layer.spec, layer.routed, H // layer.spec.kv_heads
    q = (x @ layer.q_proj.weight.T).unflatten(-1, (H, -1))
    v = (source @ layer.v_proj.weight.T).unflatten(-1, (spec.kv_heads, -1)).repeat_interleave(repeats, 2)
    q = torch.cat([sphere(q[:, :, :R]), q[:, :, R:]], 2)
    if layer.k_proj is None:
        return q, q, v
    k = (source @ layer.k_proj.weight.T).unflatten(-1, (-1, M // H)).repeat_interleave(repeats, 2)
    if layer.shared:  # keys of the groups that local heads read
        return q, torch.cat([q[:, :, :R], k[:, :, k.shape[2] - (H - R) :]], 2), v
    return q, torch.cat([sphere(k[:, :, :R]), k[:, :, R:]], 2), v


def naive(layer, x, source, mask=None):
    spec, official = layer.spec, isinstance(layer, RoutingOfficial)
    causal = spec.causal and not spec.cross
    q, k, v = heads_of(layer, x, source)
    heads = torch.zeros_like(q)

    def read(b, h, t, keys):
        weights = (k[b, keys, h] @ q[b, t, h] / math.sqrt(M // H)).softmax(0)
        return weights @ v[b, keys, h]

    for b in range(B):
        real = [j for j in range(source.shape[1]) if mask is None or mask[b, j]]
        asking = list(range(x.shape[1])) if spec.cross else real
        for h in range(layer.routed, H):
            for t in range(x.shape[1]):
                keys = [j for j in real if abs(t - j) < layer.window and (j <= t or not causal)]
                heads[b, t, h] = read(b, h, t, keys) if keys else 0
        for h in range(layer.routed):
            mu = layer.centroids[h]

            def own(x, mu=mu):
                return (mu @ x).argmax().item()

            def best(x, among, c, mu=mu):
                return sorted(among, key=lambda n, fits=x @ mu[c]: (-fits[n].item(), n))[: layer.cluster_window]

            if causal and not official:
                for t in asking:
                    mates = [j for j in asking if j <= t and own(q[b, j, h]) == own(q[b, t, h])]
                    heads[b, t, h] = read(b, h, t, mates[-layer.cluster_window :])
            elif spec.causal and not official:
                for t in asking:
                    keys = best(k[b, :, h], real, own(q[b, t, h]))
                    heads[b, t, h] = read(b, h, t, keys) if keys else 0
            else:
                found = {t: [] for t in asking}
                for c in range(layer.num_clusters):
                    keys = best(k[b, :, h], real, c)
                    for t in best(q[b, :, h], asking, c):
                        mine = [j for j in keys if j <= t or not causal]
                        found[t].append(read(b, h, t, mine) if mine else 0 * q[b, t, h])
                for t, reads in found.items():
                    heads[b, t, h] = sum(reads) / len(reads) if reads else 0
    return heads.flatten(2) @ layer.out_proj.weight.T


SLOTS = [  # class, causal, cross, shared noncausal
    (RoutingTransformer, True, False, False),
    (RoutingTransformer, False, False, False),
    (RoutingTransformer, False, False, True),
    (RoutingTransformer, False, True, False),
    (RoutingTransformer, True, True, False),
    (RoutingOfficial, True, False, False),
    (RoutingOfficial, True, True, False),
]


@pytest.mark.parametrize(("num_kv_heads", "local_heads"), [(6, None), (2, 2), (3, 0)])
@pytest.mark.parametrize(("kind", "causal", "cross", "share_qk"), SLOTS)
def test_tokens_read_members_of_their_cluster(
    kind, causal, cross, share_qk, num_kv_heads, local_heads, make_layer, agree
):
    more = {"share_qk": share_qk, "local_heads": local_heads, "num_kv_heads": num_kv_heads}
    layer = make_layer(kind, dim=M, causal=causal, cross=cross, **SIZES, **more).eval()
    x, context = stream(), stream(S, seed=2) if cross else None
    source, tensors = (context, [x, context]) if cross else (x, [x])
    mask = torch.rand(B, source.shape[1], generator=torch.Generator().manual_seed(3)) > 0.4
    agree(lambda: layer(x, context), lambda: naive(layer, x, source), [*tensors, *layer.parameters()])
    got, want = layer(x, context, key_mask=mask), naive(layer, x, source, mask)
    if not cross:  # what a masked position gives is nobody's business
        got, want = (part.masked_fill(~mask[..., None], 0.0) for part in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [37, 40])
def test_blocks_of_the_sorted_tokens_are_the_same_as_all_pairs(length, make_layer, agree):
    sizes = {"num_clusters": 2, "cluster_window": 4}
    layer, x = make_layer(RoutingTransformer, dim=M, local_heads=0, **sizes).eval(), stream(length)
    assert length > 4 * 4, "all pairs would be computed"
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.3
    agree(lambda: layer(x), lambda: naive(layer, x, x), [x, *layer.parameters()])
    got, want = layer(x, key_mask=mask), naive(layer, x, x, mask)
    torch.testing.assert_close(got[mask], want[mask])


@pytest.mark.parametrize("rotary_base", [None, 100.0])
@pytest.mark.parametrize("kind", [RoutingTransformer, RoutingOfficial])
def test_one_cluster_of_all_tokens_is_causal_attention_on_the_sphere(kind, rotary_base, make_layer):
    """The official code divides by 1 + 0.01 here, the number of clusters of a token and a constant."""
    more = {"rotary_base": rotary_base} if rotary_base else {}
    layer = make_layer(kind, dim=60, local_heads=0, num_clusters=1, cluster_window=T, **more).eval()
    x = torch.randn(B, T, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = sphere((x @ layer.q_proj.weight.T).unflatten(-1, (H, -1)))
    q = q if rotary_base is None else rotary(q, base=rotary_base)
    q, v = (part.transpose(1, 2) for part in (q, (x @ layer.v_proj.weight.T).unflatten(-1, (H, -1))))
    want = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)
    torch.testing.assert_close(layer(x), want.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T)


def test_later_tokens_move_the_published_form_and_not_the_strict_one(make_layer):
    for kind, leaks in ((RoutingOfficial, True), (RoutingTransformer, False)):
        layer, x = make_layer(kind, dim=M, **SIZES).eval(), stream()
        other = x.clone()
        other[:, 12:] = stream(seed=5)[:, 12:]
        assert torch.allclose(layer(other)[:, :12], layer(x)[:, :12]) != leaks


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_decoding_keeps_the_latest_members_of_each_cluster(num_kv_heads, make_layer):
    layer, x = make_layer(RoutingTransformer, dim=M, num_kv_heads=num_kv_heads, **SIZES).eval(), stream(41)
    want, (output, state) = layer(x), layer.prefill(x[:, :7])
    torch.testing.assert_close(output, want[:, :7])
    for t in range(7, 41):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.nbytes == B * (2 * layer.state_bytes(t + 1) - 4 * 3 * C)  # float64, but counts are int32
    assert (state.count > W).any(), "no ring went round"
    assert layer.state_bytes(41) == layer.state_bytes(5), "the state grows"


def test_a_context_is_kept_as_far_as_a_cluster_reads_it(make_layer):
    layer = make_layer(RoutingTransformer, dim=M, cross=True, **SIZES).eval()
    x, context = stream(5), stream(S, seed=2)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.7  # fewer than W of a row
    for key_mask in (None, mask):
        output, state = layer.prefill(x, context, key_mask=key_mask)
        torch.testing.assert_close(output, layer(x, context, key_mask=key_mask))
        assert state.k.shape == (B, H, C, W, M // H)


def test_centroids_move_towards_their_members_in_training_alone(make_layer):
    layer = make_layer(RoutingTransformer, dim=M, causal=False, decay=0.75, commitment=0.3, **SIZES)
    x, mask = stream(), torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    layer.centroids[0, 0] = layer.centroids[0, 1:].mean(0)  # between others: no token's best, so it stays
    before = layer.centroids.clone()
    want = layer.eval()(x, key_mask=mask)
    assert torch.equal(layer.centroids, before) and not auxiliary_losses(layer)
    torch.testing.assert_close(layer.train()(x, key_mask=mask), want)  # made from the centroids before
    q, k, _ = heads_of(layer, x, x)
    loss, expected = 0, before.clone()
    for h in range(layer.routed):
        members = [[] for _ in range(C)]
        for points in (q, k):
            away = []
            for b, t in mask.nonzero().tolist():
                point = points[b, t, h]
                c = (before[h] @ point).argmax().item()
                members[c].append(point)
                away.append((point - before[h, c]).square())
            loss = loss + torch.stack(away).mean() / layer.routed
        for c, points in enumerate(members):
            if points:
                expected[h, c] = 0.75 * before[h, c] + 0.25 * torch.stack(points).mean(0)
    torch.testing.assert_close(layer.centroids, expected)
    assert torch.equal(expected[0, 0], before[0, 0])
    got = auxiliary_losses(layer)["commitment"]
    torch.testing.assert_close(got, 0.3 * loss)
    torch.testing.assert_close(*(torch.autograd.grad(part, layer.q_proj.weight)[0] for part in (got, 0.3 * loss)))


def test_the_commitment_loss_falls_on_a_mixture_while_centroids_move(make_layer):
    layer = make_layer(RoutingTransformer, dim=M, decay=0.8, commitment=1.0, **SIZES).train()
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(3, M, generator=generator, dtype=torch.float64)
    losses = []
    for _ in range(30):
        which = torch.randint(3, (B, T), generator=generator)
        layer(centres[which] + 0.1 * torch.randn(B, T, M, generator=generator, dtype=torch.float64))
        losses.append(auxiliary_losses(layer)["commitment"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_published_defaults_parameters_and_bad_values(make_layer):
    layer = make_layer(RoutingTransformer)
    assert (layer.num_clusters, layer.cluster_window, layer.window) == (8, 512, 256)
    assert (layer.routed, layer.local, layer.decay, layer.commitment) == (3, 3, 0.999, 1e-4)
    torch.testing.assert_close(layer.centroids.square().sum(-1), torch.full((3, 8), 10.0).double(), rtol=1e-3, atol=0)
    for keywords, parameters in (({}, 3.5), ({"local_heads": 0}, 3), ({"causal": False}, 4), ({"cross": True}, 4)):
        made = make_layer(RoutingTransformer, **keywords)
        assert sum(parameter.numel() for parameter in made.parameters()) == parameters * 60 * 60
    for keywords, words in (
        ({"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        ({"cluster_window": 0}, "cluster_window must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"local_heads": 6}, "local_heads must be 0 to 5, got 6"),
        ({"decay": 1.5}, "decay must be 0 to 1, got 1.5"),
        ({"commitment": -1}, "commitment must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            make_layer(RoutingTransformer, **keywords)


def test_the_published_form_does_not_decode(make_layer):
    with pytest.raises(UnsupportedPattern, match="best tokens of the whole sequence"):
        make_layer(RoutingOfficial).init_state(1)
