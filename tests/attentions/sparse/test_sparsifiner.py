"""Sparsifiner against its prediction written out query by query, and its loss against the sum of squares."""

import math

import pytest
import torch

from attentions.base import LayerSpec, auxiliary_losses
from attentions.dense.softmax import Softmax
from attentions.sparse.sparsifiner import Sparsifiner

B, M, H, RANK = 2, 30, 6, 5
SMALL = {"dim": M, "keep": 0.3, "rank": RANK, "num_coefficients": 3, "basis_threshold": 0.2}
PATTERNS = [(False, False), (True, False), (False, True), (True, True)]  # causal, cross


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_keys(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :4] = False  # the first causal queries see nothing
    return mask


def coefficients(layer, b, h, t, q, k, seen):
    """softmax over r of q'. sum_j W_down[j, r] k'_j / sqrt(H), over the keys in `seen`."""
    g = h * layer.spec.kv_heads // H
    query = layer.sketch_q.weight @ q[b, t, h] + layer.sketch_q.bias
    scores = []
    for r in range(layer.rank):
        mixed = torch.zeros_like(query)
        for j in seen:
            mixed = mixed + layer.down[j, r] * (layer.sketch_k.weight @ k[b, j, g] + layer.sketch_k.bias)
        scores.append(query @ mixed / math.sqrt(H))
    return torch.stack(scores).softmax(0)


def visible(layer, b, t, num_keys, mask):
    stop = t + 1 if layer.spec.causal and not layer.spec.cross else num_keys
    return [j for j in range(stop) if mask is None or mask[b, j]]


def rule(layer, num_keys, mask=None):
    @torch.no_grad()
    def allowed(b, h, t, q, k):
        seen = visible(layer, b, t, num_keys, mask)
        c = coefficients(layer, b, h, t, q, k, seen).tolist()
        top = sorted(range(layer.rank), key=lambda r: -c[r])[: layer.num_coefficients]
        up = layer.up.abs().tolist()
        score = {j: sum(c[r] * up[j][r] for r in top if up[j][r] > layer.basis_threshold) for j in seen}
        count = math.ceil(layer.keep * len(seen) - 1e-9)
        return sorted(sorted(seen, key=lambda j: (-score[j], j))[:count])

    return allowed


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_a_query_reads_the_keys_with_the_largest_predictions(
    causal, cross, num_kv_heads, make_layer, agree, softmax_over
):
    layer = make_layer(Sparsifiner, causal=causal, cross=cross, num_kv_heads=num_kv_heads, **SMALL)
    x, context = stream(7 if cross else 13), stream(13, seed=2) if cross else None
    source = context if cross else x
    base = [getattr(layer, name).weight for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    for mask in (None, some_keys(13)):
        agree(
            lambda mask=mask: layer(x, context, key_mask=mask),
            lambda mask=mask: softmax_over(layer, x, source, rule(layer, 13, mask)),
            [x, context, *base] if cross else [x, *base],
        )


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.28, 1.0])  # 0.28 * 25 is a little more than 7
@pytest.mark.parametrize("causal", [False, True])
def test_every_row_keeps_its_share_of_the_visible_keys(causal, keep, make_layer):
    layer = make_layer(Sparsifiner, causal=causal, **SMALL | {"keep": keep, "basis_threshold": 100.0})  # all are equal
    shown = torch.ones(1, 1, 30, 30, dtype=torch.bool)
    shown = shown.tril() if causal else shown
    mask = layer.select(torch.rand(B, H, 30, RANK, dtype=torch.float64).softmax(-1), shown)
    want = [math.ceil(round(keep * (t + 1 if causal else 30), 9)) for t in range(30)]
    assert mask.sum(-1).tolist() == [[want] * H] * B
    assert not (mask & ~shown).any()
    assert all(mask[..., t, :count].all() for t, count in enumerate(want))  # the first among equals
    assert not layer.select(torch.rand(B, H, 30, RANK, dtype=torch.float64), shown & False).any()


@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_keeping_everything_is_softmax_attention(causal, cross, make_layer):
    layer = make_layer(Sparsifiner, causal=causal, cross=cross, num_kv_heads=2, **SMALL | {"keep": 1.0})
    dense = make_layer(Softmax, dim=M, causal=causal, cross=cross, num_kv_heads=2)
    dense.load_state_dict(layer.state_dict(), strict=False)
    arguments = (stream(17), stream(11)) if cross else (stream(17),)
    torch.testing.assert_close(layer(*arguments), dense(*arguments))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_the_loss_is_the_squared_distance_from_dense_attention(causal, cross, masked, make_layer):
    layer = make_layer(Sparsifiner, causal=causal, cross=cross, num_kv_heads=2, **SMALL).train()
    x, source = stream(7 if cross else 13), stream(13, seed=2 if cross else 1)
    mask = some_keys(13) if masked else None
    layer(*((x, source) if cross else (x,)), key_mask=mask)
    loss = layer.auxiliary_losses()["reconstruction"].item()
    q, (k, _), total = layer.query(x), layer.key_value(source), 0.0
    for b in range(B):
        for h in range(H):
            for t in range(x.shape[1]):
                seen = visible(layer, b, t, 13, mask)
                if not seen or (mask is not None and not cross and not mask[b, t]):
                    continue
                c = coefficients(layer, b, h, t, q, k, seen)
                weights = (k[b, seen, h // 3] @ q[b, t, h] / math.sqrt(5)).softmax(0)
                total += (layer.up[seen] @ c - weights).square().sum().item()  # neither cut nor its absolute value
    assert loss == pytest.approx(0.01 * total / B, rel=1e-6)


@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_the_task_does_not_reach_the_predictor_nor_its_loss_the_layer(causal, cross, make_layer):
    layer = make_layer(Sparsifiner, causal=causal, cross=cross, **SMALL).train()
    x = stream(13).requires_grad_()
    output = layer(x, stream(11, seed=2)) if cross else layer(x)
    loss = auxiliary_losses(layer)["reconstruction"]
    named = dict(layer.named_parameters())
    for result, reached in ((output.square().sum(), False), (loss, True)):
        gradients = torch.autograd.grad(result, list(named.values()), allow_unused=True, retain_graph=True)
        for name, gradient in zip(named, gradients, strict=True):
            predicts = name.startswith("sketch_") or name in ("down", "up")
            assert (gradient is not None and bool(gradient.any())) == (predicts == reached), name
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None


def test_the_prediction_improves_while_the_layer_stays_as_it_is(make_layer):
    layer, x = make_layer(Sparsifiner, **SMALL).train(), stream(19)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters() if "proj" in name}
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(40):
        layer(x)
        losses.append(auxiliary_losses(layer)["reconstruction"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(layer.get_parameter(name), value) for name, value in before.items())


@pytest.mark.parametrize("cross", [False, True])
def test_the_state_holds_the_mixed_keys(cross, make_layer):
    layer = make_layer(Sparsifiner, cross=cross, num_kv_heads=2, **SMALL)
    x = stream(17)
    want = layer(x, x) if cross else layer(x)
    if cross:  # written in two parts
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
    assert state.mixed.shape == (B, RANK, 2, 2)
    assert state.nbytes == 2 * B * layer.state_bytes(17)  # float64


def test_published_defaults_and_parameters():
    spec = LayerSpec(dim=48, num_heads=6, causal=False, max_length=197)  # a class token and 14 x 14 patches
    layer = Sparsifiner(spec)
    assert (layer.keep, layer.rank, layer.num_coefficients, layer.basis_threshold) == (0.25, 32, 8, 0.02)
    assert layer.loss_weight == 0.01
    assert sum(p.numel() for p in layer.parameters()) == 4 * 48 * 48 + 2 * 197 * 32 + 8 * 8 + 8
    assert layer.up.std().item() == pytest.approx(0.02, rel=0.05)
    context = LayerSpec(dim=48, num_heads=6, causal=False, cross=True, max_length=30, context_length=12)
    assert Sparsifiner(context).up.shape == (12, 2)
    assert Sparsifiner(LayerSpec(dim=8, num_heads=2, causal=True, max_length=3)).rank == 1


def test_what_does_not_fit_is_refused(make_layer):
    for change, message in (
        ({"keep": 0.0}, r"keep must lie in \(0, 1\], got 0.0"),
        ({"keep": 1.1}, r"keep must lie in \(0, 1\], got 1.1"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"num_coefficients": 0}, "num_coefficients must be at least 1, got 0"),
        ({"basis_threshold": -0.1}, "basis_threshold must be at least 0, got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_layer(Sparsifiner, **SMALL | change)
    layer = Sparsifiner(LayerSpec(dim=M, num_heads=H, causal=True, max_length=8)).double()
    with pytest.raises(ValueError, match="max_keys=8 positions, got 9"):
        layer(stream(9))
