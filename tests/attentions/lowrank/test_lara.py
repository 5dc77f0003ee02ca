"""LARA against importance sampling with the densities written out, Gaussian by Gaussian."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.lowrank.lara import LARA

B, M, H = 2, 20, 4


def xi(x, w):
    """exp(w.x - |x|^2 / 2) of each row of x."""
    return (x @ w - x.square().sum(-1) / 2).exp()


def gaussian(w, mean):
    """N(w; mean, I) without its constant, the same for all."""
    return (-(w - mean) @ (w - mean) / 2).exp()


def stretches(items, count):
    """Cut into `count` stretches whose lengths differ by one at most, longer ones last."""
    ends = [sum((len(items) + i) // count for i in range(c)) for c in range(count + 1)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def naive(layer, x, source, key_mask=None, noise=None):
    """o_n = sum_c iw_nc f(w_c) / sum_c iw_nc, iw_nc = alpha_nc p_n(w_c) / q_c(w_c)."""
    width = M // H
    rows = []
    for b in range(B):
        keys = [j for j in range(source.shape[1]) if key_mask is None or key_mask[b, j]]
        queries = range(x.shape[1]) if layer.spec.cross else keys
        count = min(layer.num_landmarks, len(keys), len(queries))
        heads = []
        for h in range(H):
            g = h * layer.spec.kv_heads // H
            own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
            q = x[b] @ layer.q_proj.weight[own].T / width**0.25
            k = source[b] @ layer.k_proj.weight[shared].T / width**0.25
            v = source[b] @ layer.v_proj.weight[shared].T
            near = [q[part].mean(0) for part in stretches(list(queries), count)]
            means = [n + k[part].mean(0) for n, part in zip(near, stretches(keys, count), strict=True)]
            samples = [mu if noise is None else mu + noise[b, h, c] for c, mu in enumerate(means)]
            nearness = torch.zeros(len(q), count, dtype=q.dtype)
            nearness[list(queries)] = (q[list(queries)] @ torch.stack(near).T).softmax(0)  # over queries
            outputs = []
            for query, closeness in zip(q, nearness, strict=True):
                total, norm = 0, 0
                for c, w in enumerate(samples):
                    summed = xi(k[keys], w).sum()
                    read = xi(k[keys], w) @ v[keys] / summed
                    density = gaussian(w, 0 * w) * xi(query, w) * summed
                    balance = gaussian(w, means[c]) / sum(gaussian(w, mu) for mu in means)
                    alpha = (balance + closeness[c] - closeness.mean()).clamp_min(1e-8)
                    weight = alpha * density / gaussian(w, means[c])
                    total, norm = total + weight * read, norm + weight
                outputs.append(total / norm)
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, dim=-1) @ layer.out_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_self_attention_equals_importance_sampling_at_the_means(num_kv_heads, make_layer, agree):
    layer = make_layer(LARA, dim=M, num_heads=H, causal=False, num_landmarks=3, num_kv_heads=num_kv_heads).eval()
    x = torch.randn(B, 7, M, dtype=torch.float64) / 2
    agree(lambda: layer(x), lambda: naive(layer, x, x), [x, *layer.parameters()])


def test_training_samples_around_the_means(make_layer, agree):
    layer = make_layer(LARA, dim=M, num_heads=H, causal=False, num_landmarks=3).train()
    x = torch.randn(B, 7, M, dtype=torch.float64) / 2
    torch.manual_seed(5)
    noise = torch.randn(B, H, 3, M // H, dtype=torch.float64)

    def seeded():
        torch.manual_seed(5)
        return layer(x)

    agree(seeded, lambda: naive(layer, x, x, noise=noise), [x, *layer.parameters()])


def test_masked_positions_are_in_no_stretch_neither_as_keys_nor_as_queries(make_layer, agree):
    layer = make_layer(LARA, dim=M, num_heads=H, causal=False, num_landmarks=4).eval()
    x = torch.randn(B, 9, M, dtype=torch.float64) / 2
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 1, 0, 0, 1]]).bool()  # 5 of them, 3 < 4
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("lengths", [(5, 11), (11, 5), (2, 7), (7, 2)])
def test_cross_attention_cuts_queries_and_context_into_stretches_of_their_own(lengths, make_layer, agree):
    layer = make_layer(LARA, dim=M, num_heads=H, causal=False, cross=True, num_landmarks=3).eval()
    x, context = (torch.randn(B, length, M, dtype=torch.float64) / 2 for length in lengths)
    mask = torch.ones(B, lengths[1], dtype=torch.bool)
    mask[:, 1:2] = lengths[1] == 2  # one key masked, unless there are but two
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), [x, context])


def test_more_samples_come_nearer_to_softmax_attention(make_layer):
    q, k, v = torch.randn(3, 1, 1500, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k = 0.7 * q, 0.7 * k
    want = F.scaled_dot_product_attention(*(heads.transpose(1, 2) for heads in (q, k, v))).transpose(1, 2)
    size = (want - v.mean(1, keepdim=True)).square().mean().sqrt()  # what uniform attention misses

    def error(num_landmarks):
        layer = make_layer(LARA, dim=5, num_heads=1, causal=False, num_landmarks=num_landmarks).train()
        return float((layer.attend(q, k, v) - want).square().mean().sqrt() / size)

    assert error(16) > 0.9
    assert error(1500) < 0.4


def test_all_reads_are_means_of_as_many_vectors_as_proposals(make_layer):
    layer = make_layer(LARA, dim=M, num_heads=H, causal=False, num_landmarks=2).eval()
    heads = layer.attend(*torch.randn(3, B, 37, H, 5, dtype=torch.float64))
    assert (torch.linalg.matrix_rank(heads.transpose(1, 2)) == 2).all()


def test_one_proposal_gives_every_query_one_answer(make_layer):
    layer = make_layer(LARA, dim=M, num_heads=H, causal=False, num_landmarks=1).eval()
    output = layer(torch.randn(B, 37, M, dtype=torch.float64))
    torch.testing.assert_close(output, output[:, :1].expand_as(output))


@pytest.mark.parametrize(("cross", "words"), [(False, "all queries and keys"), (True, "all queries")])
def test_a_causal_slot_is_refused_with_the_reason(cross, words):
    with pytest.raises(UnsupportedPattern, match=f"means over {words}, later ones included"):
        LARA(LayerSpec(dim=M, num_heads=H, causal=True, cross=cross))


def test_no_proposal_is_refused(make_layer):
    with pytest.raises(ValueError, match="num_landmarks must be at least 1, got 0"):
        make_layer(LARA, causal=False, num_landmarks=0)
