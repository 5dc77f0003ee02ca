"""SeerAttention against gates computed block by block, and its loss against the definition of the divergence."""

import math

import pytest
import torch

from attentions.base import auxiliary_losses, rotary
from attentions.dense.softmax import Softmax
from attentions.sparse import _selection
from attentions.sparse.seer import SeerAttention, SeerAttentionPrefillOfficial

B, M, H, SIZE = 2, 30, 6, 3
SMALL = {"dim": M, "block_size": SIZE, "top_k": 1, "threshold": None}
PATTERNS = [(False, False), (True, False), (False, True), (True, True)]  # causal, cross


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_keys(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :4] = False  # a whole block, and queries without a key
    return mask


def turned(vector, position, base):
    return vector if base is None else rotary(vector[None, None, None], base=base, start=position)[0, 0, 0]


def gates(layer, b, h, t, q, k, mask=None):
    """Candidate blocks of a query with their gates, and its own block; q and k before rotation."""
    spec, base = layer.spec, None if layer.spec.cross else layer.spec.rotary_base
    length, group = k.shape[1], H // spec.kv_heads
    g, own = h // group, -1 if spec.cross else t // SIZE  # in cross-attention no block is a query's own
    kept = [[j for j in range(n, min(length, n + SIZE)) if mask is None or mask[b, j]] for n in range(0, length, SIZE)]
    if layer.pooled:
        first = t // SIZE * SIZE
        rows = [i for i in range(first, min(q.shape[1], first + SIZE)) if spec.cross or mask is None or mask[b, i]]
        query, position, map_q = q[b, rows, h].mean(0), first, h
    else:
        query, position, map_q = q[b, t, g * group : (g + 1) * group].flatten(), t, g
    query = turned(query if layer.gate_q is None else query @ layer.gate_q[map_q], position, base)
    logits = {}
    for n, keys in enumerate(kept):
        if not keys or (spec.causal and not spec.cross and (n > own if layer.pooled else n >= own)):
            continue
        keys = k[b, keys, g]
        pooled = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)])
        weight = layer.gate_k[h if len(layer.gate_k) == H else g]
        logits[n] = query @ turned(pooled @ weight, n * SIZE, base) / math.sqrt(layer.gate_dim)
    total = sum(logit.exp() for logit in logits.values())
    return {n: (logit.exp() / total).item() for n, logit in logits.items()}, own


def rule(layer, num_keys, mask=None):
    def allowed(b, h, t, q, k):
        found, own = gates(layer, b, h, t, q, k, mask)
        if layer.top_k is None:
            blocks = {n for n, gate in found.items() if gate >= layer.threshold}
        else:
            blocks = set(sorted(set(found) - {own}, key=lambda n: -found[n])[: layer.top_k])
        keys = [j for j in range(num_keys) if j // SIZE in blocks | {own} and (mask is None or mask[b, j])]
        return [j for j in keys if j <= t] if layer.spec.causal and not layer.spec.cross else keys

    return allowed


@pytest.mark.parametrize("keywords", [{"num_kv_heads": 6}, {"num_kv_heads": 2, "gate_dim": 4}])
@pytest.mark.parametrize(
    ("layer_class", "causal", "cross"),
    [*((SeerAttention, *pattern) for pattern in PATTERNS), (SeerAttentionPrefillOfficial, True, False)],
)
def test_a_query_reads_the_blocks_with_the_largest_gates(
    layer_class, causal, cross, keywords, form, make_layer, agree, softmax_over
):
    layer = make_layer(layer_class, causal=causal, cross=cross, **SMALL, **keywords)
    x, context = stream(8 if cross else 14), stream(14, seed=2) if cross else None
    source = context if cross else x
    base = [parameter for name, parameter in layer.named_parameters() if "gate" not in name]
    for mask in (None, some_keys(14)):
        agree(
            lambda mask=mask: layer(x, context, key_mask=mask),
            lambda mask=mask: softmax_over(layer, x, source, rule(layer, 14, mask)),
            [x, context, *base] if cross else [x, *base],
        )


@pytest.mark.parametrize("causal", [False, True])
def test_a_threshold_reads_every_block_whose_gate_reaches_it(causal, make_layer, softmax_over):
    layer = make_layer(SeerAttention, causal=causal, **SMALL | {"top_k": None, "threshold": 0.2})
    x = stream(17)
    want = softmax_over(layer, x, x, rule(layer, 17))
    torch.testing.assert_close(layer(x), want)
    few = make_layer(SeerAttention, causal=causal, **SMALL | {"top_k": None, "threshold": 1.0})
    assert not torch.allclose(few(x), want)


@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
@pytest.mark.parametrize("budget", [{"threshold": 0.0, "top_k": None}, {"threshold": None, "top_k": 5}])
def test_threshold_zero_and_all_blocks_are_softmax_attention(budget, causal, cross, make_layer):
    layer = make_layer(SeerAttention, causal=causal, cross=cross, rotary_base=100.0, num_kv_heads=3, dim=60, **budget)
    dense = make_layer(Softmax, causal=causal, cross=cross, rotary_base=100.0, num_kv_heads=3, dim=60)
    dense.load_state_dict(layer.state_dict(), strict=False)
    layer.block_size = 7
    x = torch.randn(B, 31, 60, dtype=torch.float64)
    arguments = (x, x) if cross else (x,)
    torch.testing.assert_close(layer(*arguments), dense(*arguments))


@pytest.mark.parametrize("layer_class", [SeerAttention, SeerAttentionPrefillOfficial])
def test_gates_are_rotated_by_the_query_and_by_the_first_position_of_a_block(layer_class, make_layer):
    layer = make_layer(layer_class, rotary_base=10.0, num_kv_heads=2, gate_dim=4, **SMALL | {"dim": 60})
    x = torch.randn(B, 14, 60, dtype=torch.float64)
    q, (k, _) = layer.query(x), layer.key_value(x)
    logits = layer.gate(q, layer.block_keys(k, None))
    candidates, _ = layer._candidates(logits, None)
    found = logits.masked_fill(~candidates, -math.inf).softmax(-1)
    for h in range(H):
        for t in range(3, 14):
            row, head = (t // SIZE, h) if layer.pooled else (t, h // 3)
            want, _ = gates(layer, 0, h, t, q, k)
            torch.testing.assert_close(found[0, head, row, list(want)].tolist(), list(want.values()))


def dense(layer, x, source, mask):
    """Weights of softmax attention [B, H, T, S] by its definition."""
    q, k = layer.query(x), layer.key_value(source)[0]
    causal, cross = layer.spec.causal, layer.spec.cross
    if layer.spec.rotary_base is not None:
        q, k = (rotary(heads, base=layer.spec.rotary_base) for heads in (q, k))
    k = k.repeat_interleave(H // layer.spec.kv_heads, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.zeros(B, 1, x.shape[1], source.shape[1], dtype=torch.bool)
    if causal and not cross:
        hidden = hidden | torch.ones(x.shape[1], source.shape[1], dtype=torch.bool).triu(1)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None]
    return scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize(
    ("layer_class", "causal", "cross"),
    [*((SeerAttention, *pattern) for pattern in PATTERNS), (SeerAttentionPrefillOfficial, True, False)],
)
def test_the_loss_is_the_divergence_from_the_largest_weights_of_dense_attention(
    layer_class, causal, cross, num_kv_heads, masked, make_layer
):
    layer = make_layer(layer_class, causal=causal, cross=cross, num_kv_heads=num_kv_heads, **SMALL).train()
    x, source = stream(14), stream(14, seed=2 if cross else 1)
    mask = some_keys(14) if masked else None
    layer(*((x, source) if cross else (x,)), key_mask=mask)
    loss = layer.auxiliary_losses()["gate"].item()
    weights, q, (k, _) = dense(layer, x, source, mask), layer.query(x), layer.key_value(source)
    group, num_blocks = H // num_kv_heads, 5
    heads = list(range(H)) if layer.pooled else list(range(0, H, group))
    total = count = 0
    for b in range(B):
        for h in heads:
            for row in range(num_blocks if layer.pooled else 14):
                queries = range(row * SIZE, min(14, row * SIZE + SIZE)) if layer.pooled else [row]
                if not cross:
                    queries = [t for t in queries if mask is None or mask[b, t]]
                if not queries or (causal and not cross and row < (num_blocks if layer.pooled else 14) // 4):
                    continue
                found, _ = gates(layer, b, h, queries[0], q, k, mask)
                if not found:
                    continue
                peers = [h] if layer.pooled else range(h, h + group)
                target = {
                    n: max(weights[b, i, t, n * SIZE : n * SIZE + SIZE].max().item() for i in peers for t in queries)
                    for n in found
                }
                whole = sum(target.values())
                total += sum(p / whole * math.log(p / whole / found[n]) for n, p in target.items() if p > 0)
                count += num_blocks
    assert loss == pytest.approx(10 * total / count, rel=1e-6)
    assert loss > 1e-3


def test_the_target_is_the_maximum_over_blocks_of_dense_attention(make_layer):
    for causal in (True, False):
        layer, x = make_layer(SeerAttention, causal=causal, num_kv_heads=2, **SMALL), stream(14)
        q, k = layer.query(x), layer.key_value(x)[0]
        weights = torch.nn.functional.pad(dense(layer, x, x, None), (0, 1, 0, 1))
        blocks = weights.unflatten(-1, (5, SIZE)).amax(-1)
        want = (
            blocks.unflatten(2, (5, SIZE)).amax(3) if layer.pooled else blocks[:, :, :14].unflatten(1, (2, 3)).amax(2)
        )
        torch.testing.assert_close(layer.target(q, k, None, want.shape[1]), want)


@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_the_task_does_not_reach_the_gate_nor_the_gate_loss_the_layer(causal, cross, make_layer):
    layer = make_layer(SeerAttention, causal=causal, cross=cross, gate_dim=4, **SMALL).train()
    x = stream(14).requires_grad_()
    output = layer(x, stream(14, seed=2)) if cross else layer(x)
    loss = auxiliary_losses(layer)["gate"]
    named = dict(layer.named_parameters())
    for result, reached in ((output.square().sum(), False), (loss, True)):
        gradients = torch.autograd.grad(result, list(named.values()), allow_unused=True, retain_graph=True)
        for name, gradient in zip(named, gradients, strict=True):
            assert (gradient is not None and bool(gradient.any())) == (name.startswith("gate_") == reached), name
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None
    layer.eval()(x.detach(), *([stream(14)] if cross else []))
    assert not auxiliary_losses(layer)


def test_the_divergence_falls_while_the_layer_stays_as_it_is(make_layer):
    layer, x = make_layer(SeerAttention, **SMALL).train(), stream(41)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(40):
        layer(x)
        losses.append(auxiliary_losses(layer)["gate"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("gate_")


def test_only_the_published_prefill_lets_a_later_query_choose(make_layer):
    x, other = stream(30), stream(30)
    other[:, 28:] = stream(30, seed=5)[:, 28:] * 3
    for layer_class, leaks in ((SeerAttention, False), (SeerAttentionPrefillOfficial, True)):
        layer = make_layer(layer_class, **SMALL)
        assert torch.allclose(layer(x)[:, :27], layer(other)[:, :27])
        assert torch.allclose(layer(x)[:, 27], layer(other)[:, 27]) != leaks


@pytest.mark.parametrize("cross", [False, True])
def test_the_state_holds_a_gate_per_block_and_the_incomplete_block(cross, make_layer):
    keywords = SMALL | {"dim": 60, "rotary_base": 10.0, "gate_dim": 4}
    layer = make_layer(SeerAttention, cross=cross, num_kv_heads=2, **keywords)
    x = torch.randn(B, 17, 60, dtype=torch.float64)
    want = layer(x, x) if cross else layer(x)
    if cross:  # written in two parts, the first with a short block
        k, v = layer.key_value(x)
        state = layer.update(layer.init_memory(B, x), k[:, :7], v[:, :7])
        state = layer.update(state, k[:, 7:], v[:, 7:])
        output, _ = layer.step(x[:, 5:6], state)
        torch.testing.assert_close(output, want[:, 5:6])
    else:
        output, state = layer.prefill(x[:, :7])
        torch.testing.assert_close(output, want[:, :7])
        for t in range(7, 17):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
    assert (state.gates.shape, state.tail.shape) == ((B, 6, 2, 4), (B, 2, 2, 10))
    torch.testing.assert_close(state.gates, layer.block_keys(layer.key_value(x)[0], None))
    assert state.nbytes == 2 * B * layer.state_bytes(17)  # float64


def test_parameters_and_published_defaults(make_layer):
    layer = make_layer(SeerAttention)
    assert (layer.block_size, layer.top_k, layer.threshold, layer.gate_loss_scale) == (64, None, 5e-4, 10.0)
    dim, width = 60, 10
    count = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    assert (count["gate_q"], count["gate_k"]) == (dim * width, 3 * dim * width)
    pooled = make_layer(SeerAttention, causal=False, num_kv_heads=2)
    assert pooled.gate_q is None
    assert pooled.gate_k.numel() == 3 * dim * width
    assert sum(count.values()) == 4 * dim * dim + 4 * dim * width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"threshold": 0.1}, "one of top_k and threshold must be null, got 1 and 0.1"),
        ({"top_k": None}, "one of top_k and threshold must be null, got None and None"),
        ({"top_k": None, "threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"gate_dim": 3, "rotary_base": 10.0, "dim": 60}, "an even gate_dim, got 3; nearest: 2, 4"),
    ],
)
def test_bad_values_are_refused(change, message, make_layer):
    with pytest.raises(ValueError, match=message):
        make_layer(SeerAttention, **SMALL | change)
