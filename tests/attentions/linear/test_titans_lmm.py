"""Titans' neural memory against autograd on its inner loss, one position and one gradient at a time."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec
from attentions.linear._neural_memory import NeuralState, learn, predict
from attentions.linear._recurrence import scan
from attentions.linear.titans_lmm import TitansLMM

B, T, G, H, D, M = 2, 13, 2, 4, 5, 20


def answer(weights, x, gain=None):
    """M(x): matrices from the right, and between them GELU; with a gain x + gain * LN(..)."""
    y = x
    for depth, weight in enumerate(weights):
        if depth:
            y = y * (1 + torch.erf(y / 2**0.5)) / 2
        y = y @ weight
    return y if gain is None else x + gain * (y - y.mean()) / (y.var(correction=0) + 0.1).sqrt()


def naive_learn(weights, k, v, step, keep, momentum, chunk_size, visible=None, gain=None):
    """Weights after each position of one head, eq. 12 to 14, with gradients at the weights before the chunk."""
    surprise, after = [torch.zeros_like(w) for w in weights], []
    for t in range(len(k)):
        if t % chunk_size == 0:
            start = weights
        if visible is None or visible[t]:
            leaf = [w if w.requires_grad else w.clone().requires_grad_() for w in start]
            loss = (answer(leaf, k[t], gain) - v[t]).square().sum()
            gradient = torch.autograd.grad(loss, leaf, create_graph=True)
            surprise = [momentum[t] * s - step[t] * g for s, g in zip(surprise, gradient, strict=True)]
            weights = [keep[t] * w + s for w, s in zip(weights, surprise, strict=True)]
        after.append(weights)
    return after


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(depth=1, length=T):
    """A state, keys of unit length, values, queries, and rates."""
    widths = [D, *[7] * (depth - 1), D]
    start = [0.5 * random(B, G, i, o, seed=9 + i + n) for n, (i, o) in enumerate(itertools.pairwise(widths))]
    heads = {"k": F.normalize(random(B, length, G, D, seed=1), dim=-1), "v": random(B, length, G, D, seed=2)}
    heads["q"] = random(B, length, H, D, seed=3)
    rates = {
        "step": 0.3 * random(B, length, G, seed=4).sigmoid(),
        "log_keep": F.logsigmoid(random(B, length, G, seed=5) + 1),
        "log_momentum": F.logsigmoid(random(B, length, G, seed=6)),
    }
    return start, heads, rates


def begun(start):
    weights = tuple(start)
    return NeuralState(weights=weights, start=weights, surprise=tuple(torch.zeros_like(w) for w in weights))


def naive(start, heads, rates, chunk_size, mask=None, gain=None):
    rows = []
    for b in range(B):
        for h in range(H):
            g = h * G // H
            after = naive_learn(
                [w[b, g] for w in start],
                *(heads[name][b, :, g] for name in ("k", "v")),
                rates["step"][b, :, g],
                *(rates[name][b, :, g].exp() for name in ("log_keep", "log_momentum")),
                chunk_size,
                None if mask is None else mask[b],
                None if gain is None else gain[g],
            )
            rows.append(
                torch.stack(
                    [answer(w, heads["q"][b, t, h], None if gain is None else gain[g]) for t, w in enumerate(after)]
                )
            )
    return torch.stack(rows).reshape(B, H, -1, D).transpose(1, 2)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 12])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chunks_equal_one_position_at_a_time_with_gradients_at_the_start_of_the_chunk(depth, chunk_size, agree):
    start, heads, rates = case(depth)
    inputs = [*start, *heads.values(), *rates.values()]
    for gain in (None, random(G, D, seed=8)):
        agree(
            lambda gain=gain: learn(begun(start), **heads, **rates, chunk_size=chunk_size, gain=gain)[0],
            lambda gain=gain: naive(start, heads, rates, chunk_size, gain=gain),
            inputs if gain is None else [*inputs, gain],
        )


def test_a_masked_position_changes_nothing_and_counts_as_a_place(agree):
    start, heads, rates = case(2)
    mask, gain = random(B, T, seed=7) > -0.3, random(G, D, seed=8)
    assert not mask.all()
    agree(
        lambda: learn(begun(start), **heads, **rates, chunk_size=4, key_mask=mask, gain=gain)[0],
        lambda: naive(start, heads, rates, 4, mask, gain),
        [*start, *heads.values(), *rates.values(), gain],
    )


@pytest.mark.parametrize("first", [1, 3, 4, 6])
@pytest.mark.parametrize("second", [1, 2, 7])
def test_a_memory_can_learn_in_pieces_of_any_length(first, second):
    start, heads, rates = case(2)
    want, end = learn(begun(start), **{n: x[:, : first + second] for n, x in (heads | rates).items()}, chunk_size=4)
    one, state = learn(begun(start), **{n: x[:, :first] for n, x in (heads | rates).items()}, chunk_size=4)
    two, state = learn(state, **{n: x[:, first : first + second] for n, x in (heads | rates).items()}, chunk_size=4)
    torch.testing.assert_close(torch.cat([one, two], 1), want)
    for name in ("weights", "start", "surprise"):
        torch.testing.assert_close(getattr(state, name), getattr(end, name))
    torch.testing.assert_close(
        predict(state.weights, heads["q"][:, :3])[:, :1], predict(end.weights, heads["q"][:, :1])
    )


def test_without_a_step_the_memory_only_fades():
    start, heads, rates = case()
    got = learn(begun(start), **heads, **rates | {"step": torch.zeros(B, T, G)}, chunk_size=4)[0]
    faded = (
        predict(tuple(start), heads["q"]) * rates["log_keep"].cumsum(1).exp().repeat_interleave(H // G, 2)[..., None]
    )
    torch.testing.assert_close(got, faded)
    other = heads | {"v": random(B, T, G, D, seed=8)}
    assert torch.equal(got, learn(begun(start), **other, **rates | {"step": torch.zeros(B, T, G)}, chunk_size=4)[0])


def test_full_forgetting_leaves_nothing_but_the_surprise_of_the_moment():
    """alpha = 1 and eta = 0 at position 6, which begins a chunk: M_6 = -theta_6 times the gradient at M_5."""
    start, heads, rates = case()
    for name in ("log_keep", "log_momentum"):
        rates[name] = rates[name].index_fill(1, torch.tensor([6]), -1e4)
    got = learn(begun(start), **heads, **rates, chunk_size=3)[0]
    _, before = learn(begun(start), **{n: x[:, :6] for n, x in (heads | rates).items()}, chunk_size=3)
    k, v, theta = heads["k"][:, 6], heads["v"][:, 6], rates["step"][:, 6]
    error = 2 * (torch.einsum("bgk,bgkv->bgv", k, before.weights[0]) - v)
    left = torch.einsum("bg,bgk,bgv->bgkv", -theta, k, error)
    want = torch.einsum("bgrk,bgkv->bgrv", heads["q"][:, 6].unflatten(1, (G, -1)), left).flatten(1, 2)
    torch.testing.assert_close(got[:, 6], want)


def test_one_position_a_chunk_without_momentum_is_the_gated_delta_rule():
    """beta = 2 theta / a and values a v, with a = 1 - alpha, in our own recurrence and in a loop."""
    _, heads, rates = case()
    keep = rates["log_keep"].exp()
    del rates["log_momentum"]
    empty = NeuralState(weights=(torch.zeros(B, G, D, D, dtype=torch.float64),))
    got = learn(empty, heads["k"], heads["v"], heads["q"][:, :, :G], **rates, chunk_size=1)[0]
    strength, values = 2 * rates["step"] / keep, keep[..., None] * heads["v"]
    want = scan(heads["q"][:, :, :G], heads["k"], values, log_decay=rates["log_keep"], beta=strength)
    torch.testing.assert_close(got, want)
    memory = torch.zeros(D, D, dtype=torch.float64)
    for t in range(T):
        k, v, theta = heads["k"][0, t, 0], heads["v"][0, t, 0], rates["step"][0, t, 0]
        memory = (keep[0, t, 0] * torch.eye(D) - 2 * theta * torch.outer(k, k)) @ memory + 2 * theta * torch.outer(k, v)
        torch.testing.assert_close(heads["q"][0, t, 0] @ memory, got[0, t, 0])


def test_no_momentum_is_a_momentum_of_zero():
    start, heads, rates = case(2)
    zero = rates | {"log_momentum": torch.full_like(rates["log_momentum"], -1e4)}
    without = {name: x for name, x in rates.items() if name != "log_momentum"}
    bare = NeuralState(weights=tuple(start), start=tuple(start))
    got = learn(bare, **heads, **without, chunk_size=4)[0]
    torch.testing.assert_close(got, learn(begun(start), **heads, **zero, chunk_size=4)[0])


# -- the layer ------------------------------------------------------------------------------------


def convolved(projection, taps, stream, t):
    """SiLU of sum_i taps_i W x_{t - K + 1 + i}."""
    reach = taps.shape[1] - 1
    total = sum(taps[:, i] * (projection @ stream[t - reach + i]) for i in range(reach + 1) if t - reach + i >= 0)
    return F.silu(total)


def naive_layer(layer, x, context=None, key_mask=None):
    spec, groups = layer.spec, layer.spec.kv_heads
    width = spec.head_dim
    rows = []
    for b in range(len(x)):
        source = x[b] if context is None else context[b]
        visible = torch.ones(len(source), dtype=torch.bool) if key_mask is None else key_mask[b]
        source = torch.where(visible[:, None], source, 0.0)
        queries = source if context is None else x[b]
        runs = [run(layer, source, queries, visible, groups, width, context is not None)]
        if context is None and not spec.causal:
            runs.append(run(layer, source.flip(0), queries.flip(0), visible.flip(0), groups, width, False).flip(0))
        heads = sum(runs) / len(runs)
        normed = heads * (heads.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.norm.weight
        rows.append((normed.flatten(1) * (x[b] @ layer.gate_proj.weight.T).sigmoid()) @ layer.out_proj.weight.T)
    return torch.stack(rows)


def run(layer, source, queries, visible, groups, width, cross):
    """Heads [T, H, D] of one row, in the direction of `source`."""
    num_heads = layer.spec.num_heads
    half = groups * width
    k_taps, v_taps = layer.conv.weight[:half], layer.conv.weight[half:]
    k = torch.stack([convolved(layer.k_proj.weight, k_taps, source, t) for t in range(len(source))])
    v = torch.stack([convolved(layer.v_proj.weight, v_taps, source, t) for t in range(len(source))])
    q = torch.stack([convolved(layer.q_proj.weight, layer.query_conv.weight, queries, t) for t in range(len(queries))])
    rates = (source @ layer.rate_proj.weight.T + layer.rate_bias).sigmoid().unflatten(1, (-1, groups))
    heads = []
    for h in range(num_heads):
        g = h * groups // num_heads
        own = slice(g * width, (g + 1) * width)
        momentum = rates[:, 2, g] if layer.momentum else torch.zeros(len(source))
        after = naive_learn(
            [start[g] for start in layer.start],
            F.normalize(k[:, own], dim=-1),
            v[:, own],
            rates[:, 0, g] / (1 if len(layer.start) == 1 else 4 * width),
            1 - rates[:, 1, g],
            momentum,
            layer.chunk_size,
            visible,
            layer.gain[g] if len(layer.start) > 1 else None,
        )
        asked = F.normalize(q[:, h * width : (h + 1) * width], dim=-1)
        heads.append(
            torch.stack(
                [
                    answer(after[-1 if cross else t], asked[t], layer.gain[g] if len(layer.start) > 1 else None)
                    for t in range(len(queries))
                ]
            )
        )
    return torch.stack(heads, 1)


def stream(length, seed=2):
    return random(B, length, M, seed=seed)


@pytest.fixture
def make(make_layer):
    def layer(**keywords):
        return make_layer(TitansLMM, dim=M, num_heads=4, chunk_size=3, **{"num_kv_heads": 2, **keywords})

    return layer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_self_attention_equals_gradient_descent_on_the_inner_loss(depth, causal, make, agree):
    layer, x, mask = make(depth=depth, causal=causal), stream(7), torch.arange(7).expand(B, -1) != 2
    agree(lambda: layer(x), lambda: naive_layer(layer, x), [x, *layer.parameters()])
    kept = mask[..., None]  # a masked position's own output is nobody's
    agree(
        lambda: layer(x, key_mask=mask) * kept,
        lambda: naive_layer(layer, x, key_mask=mask) * kept,
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
def test_cross_attention_reads_what_was_learned_from_the_context(momentum, causal, make, agree):
    layer, x, context = make(cross=True, causal=causal, momentum=momentum), stream(5), stream(8, 3)
    mask = random(B, 8, seed=7) > -0.5
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive_layer(layer, x, context, mask), inputs)


def test_ungrouped_heads_have_a_memory_each(make, agree):
    layer, x = make(num_kv_heads=4), stream(7)
    agree(lambda: layer(x), lambda: naive_layer(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_decoding_goes_on_from_a_prompt_that_ends_anywhere_in_a_chunk(first, make):
    layer, x = make(depth=2), stream(11)
    got, state = layer.prefill(x[:, :first])
    for t in range(first, 11):
        output, state = layer.step(x[:, t : t + 1], state)
        got = torch.cat([got, output], 1)
    torch.testing.assert_close(got, layer(x))
    per_sequence = 3 * 2 * 2 * D * 4 * D + 3 * M  # weights, start, surprise of two layers and two heads; the tail
    assert state.nbytes == 8 * B * per_sequence and layer.state_bytes(11) == 4 * per_sequence


def test_what_it_starts_with_and_weighs():
    layer = TitansLMM(LayerSpec(dim=64, num_heads=2, causal=True))
    start = [rate.mean().item() for rate in layer.rate_bias.sigmoid().unflatten(0, (3, 2))]
    assert start == pytest.approx([0.5 / 16, 0.01, 0.5]) and layer.start[-1].eq(0).all()
    small = 4 * 3 * 64 + 3 * 2 * 64 + 3 * 2 + 2 * 32 * 32 + 32  # convolutions, rates, memory, norm
    assert sum(parameter.numel() for parameter in layer.parameters()) == 5 * 64**2 + small
    deep = TitansLMM(LayerSpec(dim=64, num_heads=2, causal=True), depth=2, momentum=False)
    assert len(deep.start) == 2 and deep.rate_proj.out_features == 4
    assert [start.shape for start in deep.start] == [(2, 32, 128), (2, 128, 32)] and deep.gain.eq(1).all()
    assert deep.state_bytes(7) == 4 * (2 * 2 * 2 * 32 * 128 + 3 * 64)
    for start, std in zip(deep.start, (1, 128**-0.5), strict=True):
        assert math.isclose(start.std().item(), std, rel_tol=0.1)


@pytest.mark.parametrize("name", ["depth", "chunk_size"])
def test_bad_values_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TitansLMM(LayerSpec(dim=32, num_heads=2, causal=True), **{name: 0})
