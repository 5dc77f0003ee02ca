"""Uniform attention against a loop that averages what it sees."""

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.dense.uniform import Uniform

B, T, S, M = 2, 13, 7, 10


def make(kind=Uniform, *, causal, cross=False):
    torch.manual_seed(0)
    return kind(LayerSpec(dim=M, num_heads=5, causal=causal, cross=cross)).double()


def stream(length, seed):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(layer, x, source, causal, mask):
    rows = []
    for b in range(B):
        for t in range(x.shape[1]):
            seen = [j for j in range(t + 1 if causal else source.shape[1]) if mask[b, j]]
            total = sum((layer.v_proj.weight @ source[b, j] for j in seen), torch.zeros(M, dtype=torch.float64))
            rows.append(layer.out_proj.weight @ (total / max(1, len(seen))))
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("causal", "cross"), [(True, False), (False, False), (True, True), (False, True)])
def test_every_visible_position_counts_the_same(causal, cross, masked, agree):
    layer, x = make(causal=causal, cross=cross), stream(T, 1)
    source = stream(S, 2) if cross else x
    mask = torch.ones(B, source.shape[1], dtype=torch.bool)
    if masked:
        mask = torch.rand(B, source.shape[1], generator=torch.Generator().manual_seed(3)) > 0.4
    context = source if cross else None
    inputs = [x, *([source] if cross else []), *layer.parameters()]
    agree(
        lambda: layer(x, context, key_mask=mask if masked else None),
        lambda: naive(layer, x, source, causal and not cross, mask),
        inputs if not cross else inputs[1:],  # queries carry no gradient: nothing is asked of them
    )


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_softmax_attention_whose_scores_are_equal(causal):
    layer, softmax, x = make(causal=causal), make(Softmax, causal=causal), stream(T, 1)
    with torch.no_grad():
        softmax.q_proj.weight.zero_()
        softmax.v_proj.weight.copy_(layer.v_proj.weight)
        softmax.out_proj.weight.copy_(layer.out_proj.weight)
    torch.testing.assert_close(layer(x), softmax(x))


def test_a_context_where_none_belongs_is_refused_and_a_missing_one_too():
    with pytest.raises(ValueError, match=r"spec\.cross=False, but a context was given"):
        make(causal=True)(stream(T, 1), stream(T, 2))
    with pytest.raises(ValueError, match=r"spec\.cross=True, but a context was not given"):
        make(causal=True, cross=True)(stream(T, 1))
    with pytest.raises(ValueError, match="decodes over a context"):
        make(causal=True, cross=True).init_state(B)
