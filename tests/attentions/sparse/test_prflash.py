"""PrFlashAttention against sums over kept blocks, with the draw of the forward replayed under its seed."""

import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.dense.softmax import Softmax
from attentions.sparse.prflash import PrFlashAttention

B, T, M, H, SIZE = 2, 11, 12, 4, 3


def stream(length=T, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probability(layer, i, j):
    return (1 + abs(i // layer.block_size - j // layer.block_size)) ** -layer.decay


def naive(layer, x, keep, mask=None):
    width, rows = M // H, []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g, terms = h * layer.spec.kv_heads // H, []
                q = layer.q_proj.weight[h * width : (h + 1) * width] @ x[b, i]
                for j in range(i + 1 if layer.spec.causal else x.shape[1]):
                    if keep[h, i // layer.block_size, j // layer.block_size] and (mask is None or mask[b, j]):
                        k, v = (p.weight[g * width : (g + 1) * width] @ x[b, j] for p in (layer.k_proj, layer.v_proj))
                        weight = torch.exp(q @ k / math.sqrt(width))
                        terms.append((weight / probability(layer, i, j) if layer.importance else weight, v))
                total = sum(weight for weight, _ in terms)
                heads.append(sum(weight / total * v for weight, v in terms) if terms else 0.0 * q)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize(("causal", "num_kv_heads"), [(True, 2), (False, 4)])
def test_training_reads_the_kept_blocks_only(causal, num_kv_heads, importance, masked, make_layer, agree):
    keywords = {"block_size": SIZE, "decay": 1.0, "importance": importance}
    layer = make_layer(PrFlashAttention, dim=M, num_heads=H, causal=causal, num_kv_heads=num_kv_heads, **keywords)
    x, mask = stream(), None
    if masked:
        mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
        mask[0, :4] = False  # queries without a key
    torch.manual_seed(5)
    keep, _ = layer.draw(4, x)
    assert 0 < keep.double().mean() < 1 and keep.diagonal(dim1=1, dim2=2).all()

    def drawn():
        torch.manual_seed(5)
        return layer.train()(x, key_mask=mask)

    agree(drawn, lambda: naive(layer, x, keep, mask), [x, *layer.parameters()])


def test_blocks_are_kept_with_their_probability_and_importance_makes_up_for_it(make_layer):
    layer = make_layer(PrFlashAttention, dim=M, num_heads=H, decay=0.7, importance=True)
    torch.manual_seed(0)
    draws = [layer.draw(5, stream()) for _ in range(1000)]
    keep, bonus = torch.cat([kept for kept, _ in draws]), draws[0][1]  # 4000 draws
    behind = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    p = (1.0 + behind) ** -0.7
    assert ((keep.double().mean(0) - p).abs() < 4 * (p * (1 - p) / 4000).sqrt() + 1e-6).all()
    # numerator and denominator of softmax attention are linear in the weights of blocks
    scores = torch.randn(5, 5).exp()
    estimate = (keep * bonus.exp() * scores).sum(-1)
    error = estimate.std(0) / math.sqrt(4000)
    assert ((estimate.mean(0) - scores.sum(-1)).abs() < 4 * error).all()
    assert ((keep * scores).sum(-1).mean(0) < 0.9 * scores.sum(-1)).all()  # without it too little is summed up


@pytest.mark.parametrize("causal", [True, False])
def test_evaluation_and_a_decay_of_zero_are_softmax_attention(causal, make_layer):
    softmax = make_layer(Softmax, dim=M, num_heads=H, causal=causal)
    for decay, training in ((0.0, True), (2.0, False)):
        layer = make_layer(PrFlashAttention, dim=M, num_heads=H, causal=causal, block_size=SIZE, decay=decay)
        torch.testing.assert_close(layer.train(training)(stream()), softmax(stream()))


def test_every_forward_of_training_draws_anew(make_layer):
    layer = make_layer(PrFlashAttention, dim=M, num_heads=H, block_size=SIZE, decay=1.0).train()
    assert not torch.equal(layer(stream()), layer(stream()))


def test_bad_values_and_cross_attention_are_refused():
    spec = LayerSpec(dim=M, num_heads=H, causal=True)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        PrFlashAttention(spec, block_size=0)
    with pytest.raises(ValueError, match=r"decay must be at least 0, got -0\.5"):
        PrFlashAttention(spec, decay=-0.5)
    with pytest.raises(UnsupportedPattern, match="its probabilities need a distance"):
        PrFlashAttention(LayerSpec(dim=M, num_heads=H, causal=True, cross=True))
