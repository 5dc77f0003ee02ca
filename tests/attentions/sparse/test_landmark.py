"""Landmark attention against the grouped softmax of the paper, column by column of the sequence with its landmarks."""

import dataclasses
import math

import pytest
import torch

from attentions.base import LayerSpec, rotary
from attentions.dense.softmax import Softmax
from attentions.sparse.landmark import Landmark, landmark_softmax

B, M, H, K, SIZE = 2, 8, 4, 2, 3


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grouped(scores, landmark, block, own, readable):
    """Of one query: a softmax over own tokens and landmarks, and one over the tokens of each other block."""
    columns = [j for j in range(len(scores)) if readable(j)]
    filled = {block[j] for j in columns if not landmark[j]}
    # own tokens, landmarks of other blocks unless these are empty
    first = [j for j in columns if (block[j] == own) != landmark[j] and block[j] in filled]
    weights = [0.0 * scores[0]] * len(scores)
    if not first:
        return weights
    total = sum(torch.exp(scores[j]) for j in first)
    for j in first:
        tokens = [i for i in columns if block[i] == block[j] and not landmark[i]]
        if landmark[j]:
            within = sum(torch.exp(scores[i]) for i in tokens)
            for i in tokens:
                weights[i] = torch.exp(scores[j]) / total * torch.exp(scores[i]) / within
        else:
            weights[j] = torch.exp(scores[j]) / total
    return weights


@pytest.mark.parametrize(
    "marks",
    [[3, 7, 11], [3, 7], [0, 1, 5], [12], []],  # regular, an open block at the end, empty blocks, the last, none
)
def test_a_sequence_with_landmarks_gets_the_grouped_softmax_of_the_paper(marks, agree):
    scores = torch.randn(B, H, 13, 13, dtype=torch.float64)
    landmark = torch.zeros(13, dtype=torch.bool)
    landmark[marks] = True
    block = [sum(m < j for m in marks) for j in range(13)]  # a landmark belongs to the block that it closes

    def naive():
        flat = scores.reshape(-1, 13, 13)
        rows = [
            torch.stack(grouped(row[i], landmark, block, block[i], lambda j, i=i: j <= i))
            for row in flat
            for i in range(13)
        ]
        return torch.stack(rows).view_as(scores)

    agree(lambda: landmark_softmax(scores, landmark), naive, [scores])
    weights = landmark_softmax(scores, landmark)
    assert weights[..., landmark].eq(0).all()
    rows = torch.ones(13, dtype=torch.float64)
    if 0 in marks:  # an empty block: its landmark has nothing to read
        rows[:2] = 0.0
    torch.testing.assert_close(weights.sum(-1), rows.expand(B, H, 13))
    if not marks:
        causal = scores.masked_fill(~torch.ones(13, 13, dtype=torch.bool).tril(), -math.inf)
        torch.testing.assert_close(weights, causal.softmax(-1))


def naive_layer(layer, x, source, key_mask=None, top_k=None):
    """The sequence with its landmarks, written out."""
    spec, size = layer.spec, layer.block_size
    length, groups, base = source.shape[1], spec.kv_heads, None if spec.cross else spec.rotary_base
    causal = spec.causal and not spec.cross
    places = [(j, j // size) for j in range(length)]  # token, block
    num_blocks = math.ceil(length / size)

    def turned(vector, place):
        return vector if base is None else rotary(vector.view(1, 1, 1, -1), base=base, start=place).flatten()

    def head(proj, h, vector):
        return proj.weight[h * K : (h + 1) * K] @ vector

    outputs = []
    for b in range(B):
        real = [key_mask is None or bool(key_mask[b, j]) for j in range(length)]
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                g, own = h * groups // H, -1 if spec.cross else t // size
                keys = [turned(head(layer.k_proj, g, source[b, j]), j + c) for j, c in places]
                values = [head(layer.v_proj, g, source[b, j]) for j in range(length)]
                q = turned(head(layer.q_proj, h, x[b, t]), t + own)
                columns, block, landmark, seen = [], [], [], []
                for c in range(num_blocks):
                    tokens = [j for j, d in places if d == c]
                    place = (c + 1) * (size + 1) - 1
                    mark = turned(head(layer.k_proj, g, layer.landmark), place)
                    if layer.reads_block and any(real[j] for j in tokens):
                        query = turned(head(layer.q_proj, h, layer.landmark), place)
                        reads = [j for j in tokens if real[j]]
                        weights = torch.stack([query @ keys[j] / math.sqrt(K) for j in reads]).softmax(0)
                        mark = mark + sum(w * keys[j] for w, j in zip(weights, reads, strict=True))
                    columns += [keys[j] for j in tokens] + [mark]
                    block += [c] * (len(tokens) + 1)
                    landmark += [False] * len(tokens) + [True]
                    some = any(real[j] for j in tokens)
                    seen += [real[j] and (not causal or j <= t) for j in tokens] + [some and (not causal or c < own)]
                scores = torch.stack([q @ column / math.sqrt(K) for column in columns])
                if top_k is not None:
                    marks = [j for j in range(len(scores)) if landmark[j] and seen[j] and block[j] != own]
                    marks.sort(key=lambda j, scores=scores: (-scores[j].item(), j))
                    for j in marks[top_k:]:
                        seen[j] = False
                weights = grouped(scores, landmark, block, own, seen.__getitem__)
                tokens = [weights[j] for j in range(len(scores)) if not landmark[j]]
                heads.append(sum(w * v for w, v in zip(tokens, values, strict=True)))
            outputs.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("causal", "cross", "reads_block", "num_kv_heads", "rotary_base", "masked"),
    [
        (True, False, True, 2, 100.0, False),
        (True, False, True, 4, None, True),
        (True, False, False, 1, 30.0, False),
        (False, False, True, 2, 100.0, True),
        (False, False, False, 4, 30.0, False),
        (True, True, True, 2, None, False),
        (False, True, True, 2, 100.0, True),  # two sequences share no origin: not rotated
    ],
)
def test_it_is_the_grouped_softmax_of_the_lengthened_sequence(
    causal, cross, reads_block, num_kv_heads, rotary_base, masked, top_k, make_layer, agree
):
    layer = make_layer(
        Landmark,
        dim=M,
        num_heads=H,
        causal=causal,
        cross=cross,
        num_kv_heads=num_kv_heads,
        rotary_base=rotary_base,
        block_size=SIZE,
        top_k=top_k,
        reads_block=reads_block,
    ).eval()
    x, context = stream(3 if cross else 10), stream(10, seed=2) if cross else None
    source = context if cross else x
    mask = None
    if masked:
        mask = torch.rand(B, 10, generator=torch.Generator().manual_seed(3)) > 0.4
        mask[0, :4] = False  # a whole block, and queries without a key
    inputs = [x, *layer.parameters(), *([context] if cross else [])]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive_layer(layer, x, source, mask, top_k), inputs)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_as_many_blocks_as_there_are_is_all_of_them(causal, cross, make_layer):
    keywords = {"dim": M, "num_heads": H, "causal": causal, "cross": cross, "block_size": SIZE}
    full, retrieving = make_layer(Landmark, **keywords), make_layer(Landmark, **keywords, top_k=6).eval()
    x, context = stream(17), (stream(17, seed=2),) if cross else ()
    torch.testing.assert_close(retrieving(x, *context), full(x, *context))


def test_training_reads_all_blocks_and_evaluation_retrieves(make_layer):
    full = make_layer(Landmark, dim=M, num_heads=H, block_size=SIZE)
    layer, x = make_layer(Landmark, dim=M, num_heads=H, block_size=SIZE, top_k=1), stream(17)
    torch.testing.assert_close(layer.train()(x), full(x))
    output = layer.eval()(x)
    torch.testing.assert_close(output[:, : 2 * SIZE], full(x)[:, : 2 * SIZE])  # one block besides the own
    assert not torch.allclose(output[:, 2 * SIZE :], full(x)[:, 2 * SIZE :])


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_that_holds_everything_is_softmax_attention(causal, make_layer):
    layer = make_layer(Landmark, dim=M, num_heads=H, causal=causal, block_size=17)
    softmax = make_layer(Softmax, dim=M, num_heads=H, causal=causal)
    softmax.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(stream(17)), softmax(stream(17)))


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_state_holds_a_landmark_per_complete_block(top_k, make_layer):
    layer = make_layer(
        Landmark, dim=M, num_heads=H, num_kv_heads=2, rotary_base=100.0, block_size=SIZE, top_k=top_k
    ).eval()
    x = stream(17)
    want = layer(x)
    output, state = layer.prefill(x[:, :7])
    torch.testing.assert_close(output, want[:, :7])
    for t in range(7, 17):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    assert state.landmarks.shape == (B, 5, H, K)
    assert state.nbytes == B * 8 * (17 * 2 * 2 * K + 5 * H * K)


def test_a_context_may_be_written_in_parts(make_layer):
    layer = make_layer(Landmark, dim=M, num_heads=H, cross=True, block_size=SIZE)
    context = stream(17)
    k, v = layer.key_value(context)
    state = layer.update(layer.init_memory(B, context), k[:, :7], v[:, :7])
    state = layer.update(state, k[:, 7:], v[:, 7:])
    output, _ = layer.step(context[:, :1], state)
    torch.testing.assert_close(output, layer(context[:, :1], context))


def test_the_published_defaults_the_one_row_and_bad_values(make_layer):
    layer = make_layer(Landmark)
    assert (layer.block_size, layer.top_k) == (50, None)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 60 * 60 + 60
    spec = LayerSpec(dim=M, num_heads=H, causal=True)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        Landmark(spec, block_size=0)
    with pytest.raises(ValueError, match="top_k must be at least 1, or null for all blocks, got 0"):
        Landmark(dataclasses.replace(spec, causal=False), top_k=0)
