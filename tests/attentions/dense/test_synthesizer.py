"""Synthesizers against softmax(B) G(X) as loops over rows, heads and positions."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.dense.synthesizer import DenseSynthesizer, RandomSynthesizer

B, T, S, M, H, D, LIMIT = 2, 7, 5, 30, 3, 10, 13


def make(layer_class, *, causal=True, cross=False, num_kv_heads=None, limit=LIMIT, context_length=None, **keywords):
    spec = LayerSpec(
        dim=M,
        num_heads=H,
        num_kv_heads=num_kv_heads,
        causal=causal,
        cross=cross,
        max_length=limit,
        context_length=context_length,
    )
    torch.manual_seed(0)
    return layer_class(spec, **keywords).double()


def stream(length=T):
    return torch.randn(B, length, M, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def score(layer, x, b, h, i, j):
    """B_ij of row b and head h."""
    if isinstance(layer, RandomSynthesizer):
        return layer.matrix[h, i, j] if layer.rank is None else layer.rows[h, i] @ layer.columns[h, j]
    own = slice(h * D, (h + 1) * D)
    hidden = (layer.hidden_proj.weight[own] @ x[b, i] + layer.hidden_proj.bias[own]).clamp_min(0)
    out = hidden @ layer.weight[h] + layer.bias[h, 0]
    if out.shape[0] == layer.spec.max_keys:
        return out[j]
    width = math.ceil(math.sqrt(layer.spec.max_keys))  # A comes first, then B of this width
    return out[j // width] * out[out.shape[0] - width + j % width]


def naive(layer, x, source, causal, key_mask=None):
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                total, norm = torch.zeros(D, dtype=x.dtype), 0.0
                for j in range(i + 1 if causal else source.shape[1]):
                    if key_mask is None or key_mask[b, j]:
                        weight = torch.exp(score(layer, x, b, h, i, j))
                        total = total + weight * (layer.v_proj.weight[g * D : (g + 1) * D] @ source[b, j])
                        norm = norm + weight
                heads.append(total / norm if isinstance(norm, torch.Tensor) else total)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, -1, M)


FORMS = [
    (DenseSynthesizer, {"factorised": False}),
    (DenseSynthesizer, {"factorised": True}),
    (RandomSynthesizer, {"rank": 4}),
    (RandomSynthesizer, {"rank": None}),
    (RandomSynthesizer, {"rank": 4, "trainable": False}),
]


@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize(("layer_class", "keywords"), FORMS)
def test_causal_self_attention_equals_the_formula(layer_class, keywords, num_kv_heads, agree):
    layer, x = make(layer_class, num_kv_heads=num_kv_heads, **keywords), stream()
    agree(lambda: layer(x), lambda: naive(layer, x, x, True), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("layer_class", "keywords"), FORMS[:3])
def test_masked_values_are_not_read(layer_class, keywords, causal, agree):
    layer, x = make(layer_class, causal=causal, **keywords), stream()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # causal: the first two queries of row 0 see nothing
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, causal, mask), inputs)
    if causal:
        assert layer(x, key_mask=mask)[0, :2].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("layer_class", "keywords"), FORMS[:4])
def test_cross_attention_scores_the_positions_of_the_context(layer_class, keywords, causal, agree):
    layer = make(layer_class, causal=causal, cross=True, context_length=11, **keywords)
    x, context = stream(), stream(S)
    inputs = [context, *layer.parameters()]
    if layer_class is DenseSynthesizer:  # random: queries have positions, and no content
        inputs.append(x)
    agree(lambda: layer(x, context), lambda: naive(layer, x, context, False), inputs)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("layer_class", "keywords"), FORMS)
def test_decoding_carries_values_only(layer_class, keywords, cross):
    layer, x = make(layer_class, cross=cross, **keywords).float(), stream().float()
    context = (stream(S).float(),) if cross else ()
    want, (output, state) = layer(x, *context), layer.prefill(x[:, :3], *context)
    torch.testing.assert_close(output, want[:, :3])
    for t in range(3, T):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    length = S if cross else T
    assert state.nbytes == B * layer.state_bytes(length) == B * length * M * 4
    assert 2 * layer.state_bytes(length) == Softmax(layer.spec).state_bytes(length)


def test_a_random_synthesizer_looks_at_no_token_and_a_dense_one_at_no_key():
    other = stream()
    other[:, :5] += 1
    for layer_class, same in ((RandomSynthesizer, True), (DenseSynthesizer, False)):
        layer, x = make(layer_class), stream()
        scores, moved = layer.scores(x, 0, T), layer.scores(other, 0, T)
        torch.testing.assert_close(moved[..., 5:, :], scores[..., 5:, :])
        assert moved.equal(scores) == same


@pytest.mark.parametrize("limit", [1, 2, 12, 13, 16])
def test_factors_cover_every_position(limit):
    layer = make(DenseSynthesizer, limit=limit, factorised=True)
    assert layer.scores(stream(1), 0, limit).shape == (B, H, 1, limit)
    assert layer(stream(limit)).shape == (B, limit, M)


@pytest.mark.parametrize(
    ("layer_class", "keywords", "length", "ratio"),
    [
        (DenseSynthesizer, {"factorised": True}, 128, 0.95),
        (DenseSynthesizer, {"factorised": True}, 1024, 1.3),
        (DenseSynthesizer, {"factorised": False}, 128, 1.8),
        (DenseSynthesizer, {"factorised": False}, 1024, 9.0),
        (RandomSynthesizer, {"rank": 4}, 128, 1.0),
        (RandomSynthesizer, {"rank": None}, 128, 8.5),
        (RandomSynthesizer, {"trainable": False}, 128, 0.5),
    ],
)
def test_parameters_are_those_of_the_docstring(layer_class, keywords, length, ratio):
    spec = LayerSpec(dim=32, num_heads=2, causal=True, max_length=length)
    count = sum(p.numel() for p in layer_class(spec, **keywords).parameters())
    assert count / (4 * 32 * 32) == pytest.approx(ratio, rel=0.04)  # the docstring rounds


def test_a_fixed_matrix_is_saved_and_not_learned():
    layer = make(RandomSynthesizer, trainable=False)
    assert {"rows", "columns"} <= layer.state_dict().keys()
    assert {name for name, _ in layer.named_parameters()} == {"v_proj.weight", "out_proj.weight"}


@pytest.mark.parametrize("rank", [None, 4, 32])
def test_random_scores_start_at_unit_variance(rank):
    scores = make(RandomSynthesizer, limit=200, rank=rank).scores(stream(200), 0, 200)
    assert scores.std().item() == pytest.approx(1.0, abs=0.1)  # 3 heads of 200 x 200, of rank 4 at least


@pytest.mark.parametrize("layer_class", [DenseSynthesizer, RandomSynthesizer])
def test_positions_without_scores_are_refused(layer_class):
    with pytest.raises(ValueError, match="scores for the 13 key positions of its slot, got 14; the slot's max_length"):
        make(layer_class)(stream(LIMIT + 1))
    with pytest.raises(ValueError, match="scores for the 5 key positions of its slot, got 6"):
        make(layer_class, cross=True, context_length=5)(stream(), stream(6))
    layer = make(layer_class)
    _, state = layer.prefill(stream(LIMIT))
    with pytest.raises(ValueError, match="scores for the 13 key positions of its slot, got 14"):
        layer.step(stream(1), state)


def test_only_a_random_synthesizer_needs_query_positions_in_cross_attention():
    with pytest.raises(ValueError, match="scores for the 13 query positions of its slot, got 14"):
        make(RandomSynthesizer, cross=True)(stream(LIMIT + 1), stream())
    assert make(DenseSynthesizer, cross=True)(stream(LIMIT + 1), stream()).shape == (B, LIMIT + 1, M)


@pytest.mark.parametrize("cross", [True, False])
def test_a_context_belongs_to_cross_attention_and_to_nothing_else(cross):
    layer, context = make(DenseSynthesizer, cross=cross), () if cross else (stream(),)
    for call in (lambda: layer(stream(), *context), lambda: layer.init_state(B, *context)):
        with pytest.raises(ValueError, match=f"spec.cross={cross}, but a context was {'not ' * cross}given"):
            call()


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1 or null, got 0; nearest: 1"):
        make(RandomSynthesizer, rank=0)
