"""ProbSparse attention against algorithm 1 of its paper, query by query."""

import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.dense.softmax import Softmax
from attentions.dense.uniform import Uniform
from attentions.sparse.prob_sparse import ProbSparse

B, T, S, M, H = 2, 23, 13, 20, 4
SLOTS = [(False, 4), (False, 2), (True, 4), (True, 2)]


def inputs(cross):
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(B, length, M, generator=generator, dtype=torch.float64) for length in (T, S))
    return [x, context] if cross else [x]


def random_mask(length):
    return torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.4


def budget(factor, length):
    return min(length, factor * max(1, math.ceil(math.log(length))))


def naive(layer, x, context=None, key_mask=None):
    """u active queries by max - mean over the sample; they read all keys, the others the mean value."""
    source, width, G = x if context is None else context, M // H, layer.spec.kv_heads
    rows = []
    for b in range(B):
        keys = [j for j in range(source.shape[1]) if key_mask is None or key_mask[b, j]]
        asking = keys if context is None else range(x.shape[1])
        sample = sorted(keys, key=lambda j: layer.rank[j])[: budget(layer.factor, len(keys))]
        heads = []
        for h in range(H):
            own, shared = (slice(n * width, (n + 1) * width) for n in (h, h * G // H))
            q = x[b] @ layer.q_proj.weight[own].T
            k, v = (source[b] @ projection.weight[shared].T for projection in (layer.k_proj, layer.v_proj))
            scores = q @ k.T / math.sqrt(width)
            measure = {
                i: max(scores[i, j] for j in sample) - sum(scores[i, j] for j in sample) / len(sample) for i in asking
            }
            active = sorted(asking, key=lambda i: -measure[i])[: budget(layer.factor, len(measure))]
            lazy = sum(v[j] for j in keys) / len(keys)
            heads.append(
                torch.stack(
                    [
                        sum(torch.exp(scores[i, j]) * v[j] for j in keys) / sum(torch.exp(scores[i, j]) for j in keys)
                        if i in active
                        else lazy
                        for i in range(x.shape[1])
                    ]
                )
            )
        rows.append(torch.cat(heads, dim=-1) @ layer.out_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize(("cross", "num_kv_heads"), SLOTS)
@pytest.mark.parametrize("factor", [1, 3])
def test_active_queries_read_every_key_and_lazy_ones_the_mean(factor, cross, num_kv_heads, make_layer, agree):
    layer = make_layer(
        ProbSparse, dim=M, num_heads=H, causal=False, cross=cross, num_kv_heads=num_kv_heads, factor=factor
    ).eval()
    parts, mask = inputs(cross), random_mask(S if cross else T)
    agree(lambda: layer(*parts), lambda: naive(layer, *parts), [*parts, *layer.parameters()])
    torch.testing.assert_close(layer(*parts, key_mask=mask), naive(layer, *parts, key_mask=mask))


@pytest.mark.parametrize("cross", [False, True])
def test_budgets_count_what_is_not_masked(cross, make_layer):
    layer = make_layer(ProbSparse, dim=M, num_heads=H, causal=False, cross=cross, factor=1).eval()
    parts = inputs(cross)
    source = parts[-1]
    mask = torch.arange(source.shape[1]) < 6
    short = [*parts[:-1], source[:, :6]]
    got, want = layer(*parts, key_mask=mask.expand(B, -1)), layer(*short)
    torch.testing.assert_close(got[:, : want.shape[1]], want)


@pytest.mark.parametrize("cross", [False, True])
def test_with_every_query_active_it_is_softmax_attention(cross, make_layer):
    parts, plain = inputs(cross), {"dim": M, "num_heads": H, "causal": False, "cross": cross}
    softmax = make_layer(Softmax, **plain)
    layer, fewer = (make_layer(ProbSparse, factor=factor, **plain) for factor in (6, 5))  # 6 * ceil(ln 23) = 24
    for each in (layer, fewer):
        each.load_state_dict(softmax.state_dict(), strict=False)
    torch.testing.assert_close(layer(*parts), softmax(*parts))
    assert not torch.allclose(fewer(*parts), softmax(*parts))


def test_equal_keys_leave_the_mean(make_layer):
    layer, x = make_layer(ProbSparse, dim=M, num_heads=H, causal=False), inputs(False)[0]
    with torch.no_grad():
        layer.k_proj.weight.zero_()
    uniform = make_layer(Uniform, dim=M, num_heads=H, causal=False)
    uniform.load_state_dict({name: layer.state_dict()[name] for name in ("v_proj.weight", "out_proj.weight")})
    torch.testing.assert_close(layer(x), uniform(x))


def test_the_sample_is_new_in_training_and_kept_in_eval_mode(make_layer):
    layer, x = make_layer(ProbSparse, dim=M, num_heads=H, causal=False, factor=1), inputs(False)[0]
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    other = make_layer(ProbSparse, dim=M, num_heads=H, causal=False, factor=1, seed=1).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_bad_values_and_too_many_keys_are_refused(make_layer):
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        make_layer(ProbSparse, causal=False, factor=0)
    layer = ProbSparse(LayerSpec(dim=M, num_heads=H, causal=False, max_length=T - 1)).double()
    with pytest.raises(ValueError, match=f"at most {T - 1} keys, the slot's max_length, got {T}"):
        layer(inputs(False)[0])


@pytest.mark.parametrize("cross", [False, True])
def test_causal_forms_are_refused_with_the_reason(cross):
    with pytest.raises(UnsupportedPattern, match="depend on later queries"):
        ProbSparse(LayerSpec(dim=M, num_heads=H, causal=True, cross=cross))
