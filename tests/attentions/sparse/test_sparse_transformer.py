"""The two factorised patterns against loops over the sets A1 and A2 of the paper."""

import dataclasses
import math

import pytest
import torch

from attentions.base import LayerSpec, UnsupportedPattern
from attentions.dense.softmax import Softmax
from attentions.sparse.sparse_transformer import Fixed, Strided

B, T, M, H, STRIDE, SUMMARIES = 2, 17, 12, 4, 5, 2
KEYWORDS = {Strided: {"stride": STRIDE}, Fixed: {"stride": STRIDE, "num_summaries": SUMMARIES}}


@pytest.fixture
def make(make_layer):
    def build(layer_class, *, layer=0, combine="merged", **keywords):
        made = make_layer(
            layer_class, dim=M, num_heads=H, combine=combine, **{**KEYWORDS.get(layer_class, {}), **keywords}
        )
        if layer:  # the spec of another layer, with the same weights
            other = type(made)(
                dataclasses.replace(made.spec, layer=layer), combine=combine, **KEYWORDS[layer_class]
            ).double()
            other.load_state_dict(made.state_dict())
            return other
        return made

    return build


def stream():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masked():
    return torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.3


def sets(kind, i, head):
    """A1 and A2 of position i, past and future, from the paper's words."""
    if kind is Strided:
        near = set(range(i - STRIDE, i + STRIDE + 1))
        far = {j for j in range(T) if (i - j) % STRIDE == 0}
    else:
        near = {j for j in range(T) if j // STRIDE == i // STRIDE}
        last = STRIDE - SUMMARIES * (head % (STRIDE // SUMMARIES))
        far = {j for j in range(T) if last - SUMMARIES <= j % STRIDE < last}
    return near & set(range(T)), far


def naive(layer, x, combine, number=0, key_mask=None):
    width, rows = M // H, []
    for b in range(B):
        for i in range(T):
            heads = []
            for h in range(H):
                near, far = sets(type(layer), i, h)
                chosen = {"merged": near | far, "heads": (near, far)[h % 2], "layers": (near, far)[number % 2]}[combine]
                keys = [j for j in sorted(chosen) if j <= i or not layer.spec.causal]
                keys = [j for j in keys if key_mask is None or key_mask[b, j]]
                own, shared = (slice(n * width, (n + 1) * width) for n in (h, h * layer.spec.kv_heads // H))
                q = layer.q_proj.weight[own] @ x[b, i]
                weights = [torch.exp(q @ (layer.k_proj.weight[shared] @ x[b, j]) / math.sqrt(width)) for j in keys]
                values = [layer.v_proj.weight[shared] @ x[b, j] for j in keys]
                read = sum((w * v for w, v in zip(weights, values, strict=True)), 0 * q)
                heads.append(read / sum(weights) if keys else read)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(B, T, M)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [Strided, Fixed])
def test_each_query_reads_both_sets_in_one_softmax(kind, causal, num_kv_heads, make, agree):
    layer, x, mask = make(kind, causal=causal, num_kv_heads=num_kv_heads), stream(), masked()
    agree(lambda: layer(x), lambda: naive(layer, x, "merged"), [x, *layer.parameters()])
    torch.testing.assert_close(layer(x, key_mask=mask), naive(layer, x, "merged", key_mask=mask))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [Strided, Fixed])
@pytest.mark.parametrize(("combine", "number"), [("heads", 0), ("layers", 2), ("layers", 3)])
def test_heads_or_layers_take_the_two_steps_in_turn(combine, number, kind, causal, make, agree):
    layer, x, mask = make(kind, causal=causal, combine=combine, layer=number), stream(), masked()
    agree(
        lambda: layer(x, key_mask=mask),
        lambda: naive(layer, x, combine, number, key_mask=mask),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [Strided, Fixed])
def test_a_stride_of_the_whole_sequence_is_softmax_attention(kind, causal, make, make_layer):
    x = stream()
    want = make_layer(Softmax, dim=M, num_heads=H, causal=causal)(x)
    for stride in (T, T + 2):
        torch.testing.assert_close(make(kind, causal=causal, stride=stride)(x), want)
    assert not torch.allclose(make(kind, causal=causal, stride=T // 2)(x), want)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", [Strided, Fixed])
@pytest.mark.parametrize(("combine", "number"), [("merged", 0), ("heads", 0), ("layers", 2), ("layers", 1)])
def test_decoding_keeps_what_a_later_query_can_read(combine, number, kind, num_kv_heads, make):
    layer, x = make(kind, combine=combine, layer=number, num_kv_heads=num_kv_heads), stream()
    want = layer(x)
    state = layer.init_state(B)
    for cut in (0, 1, STRIDE, STRIDE + 1, T - 4):
        if cut:
            output, state = layer.prefill(x[:, :cut])
            torch.testing.assert_close(output, want[:, :cut])
        for t in range(cut, T):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
            assert state.nbytes == 2 * B * layer.state_bytes(t + 1)  # float64


def test_the_state_holds_a_block_and_its_summaries_the_window_or_everything(make):
    size = 4 * 2 * M  # float32, keys and values
    assert make(Strided).state_bytes(T) == T * size
    assert make(Strided, combine="layers", layer=2).state_bytes(T) == (STRIDE + 1) * size
    assert make(Fixed).state_bytes(T) == (3 * SUMMARIES + 2) * size  # three complete blocks and two positions
    assert make(Fixed).state_bytes(15) == (2 * SUMMARIES + 5) * size  # the last block may still be read
    assert make(Fixed, num_kv_heads=2).state_bytes(T) == (3 * 2 * SUMMARIES + 2) * size // 2  # two heads, four of five
    assert make(Fixed, combine="layers", layer=2).state_bytes(T) == 2 * size


@pytest.mark.parametrize(
    ("kind", "keywords", "words"),
    [
        (Strided, {"stride": 0}, "stride must be at least 1, got 0"),
        (Fixed, {"num_summaries": 6}, "num_summaries must be from 1 to stride=5, got 6"),
        (Strided, {"combine": "split"}, "combine must be one of merged, heads, layers, got split"),
    ],
)
def test_bad_values_are_refused(kind, keywords, words, make):
    with pytest.raises(ValueError, match=words):
        make(kind, **keywords)


def test_one_head_cannot_take_two_steps_and_two_sequences_have_no_stride():
    with pytest.raises(ValueError, match="needs at least 2 heads"):
        Strided(LayerSpec(dim=M, num_heads=1, causal=True), stride=STRIDE, combine="heads")
    with pytest.raises(UnsupportedPattern, match="one sequence"):
        Strided(LayerSpec(dim=M, num_heads=H, causal=False, cross=True), stride=STRIDE)
