"""LAMA against its bilinear forms c^T W_i h_t with W_i = p_i q_i^T, token by token."""

import pytest
import torch

from attentions.base import LayerSpec
from attentions.lowrank.lama import LAMA, LAMAPooling

B, T, S, M, HEADS = 2, 7, 5, 15, 3
MASK = torch.tensor([[False, True, True, False, True, True, True], [True, True, False, True, True, True, False]])


def affinity(pool, token, whole):
    """tanh(c^T p_i q_i^T h) over its norm over heads."""
    forms = [torch.outer(pool.p[:, i], pool.q[:, i]) for i in range(pool.p.shape[1])]  # W_i
    f = torch.stack([torch.tanh(whole @ form @ token) for form in forms])
    return f / torch.sqrt((f * f).sum() + 1e-6)


def pooled(pool, tokens, wholes):
    """E [m, u] of tokens, token j against wholes[j]; zeros of nothing."""
    if not tokens:
        return torch.zeros(pool.p.T.shape, dtype=pool.p.dtype)
    weights = torch.stack([affinity(pool, h, c) for h, c in zip(tokens, wholes, strict=True)]).softmax(0)
    return weights.T @ torch.stack(tokens)


def naive(layer, x, source, causal, mask=None):
    rows = []
    for b in range(B):
        for t in range(x.shape[1]):
            kept = [j for j in range(t + 1 if causal else source.shape[1]) if mask is None or mask[b, j]]
            tokens = [source[b, j] for j in kept]
            if causal:
                wholes = [sum(tokens[: n + 1]) / (n + 1) for n in range(len(tokens))]
            else:
                wholes = [sum(tokens) / len(tokens)] * len(tokens)
            gate = (layer.gate_proj.weight @ x[b, t]).softmax(0)
            rows.append(layer.out_proj.weight @ (gate @ pooled(layer.pool, tokens, wholes)))
    return torch.stack(rows).view(B, -1, M)


def make(causal=True, cross=False):
    torch.manual_seed(0)
    return LAMA(LayerSpec(dim=M, num_heads=1, causal=causal, cross=cross), num_heads=HEADS).double()


def stream(length=T):
    return torch.randn(B, length, M, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def pooling(**changes):
    torch.manual_seed(0)
    pool = LAMAPooling(M, HEADS).double()
    with torch.no_grad():
        for name, value in changes.items():
            getattr(pool, name).fill_(value)
    return pool


@pytest.mark.parametrize("mask", [None, MASK])
def test_pooling_equals_the_explicit_bilinear_form(mask, agree):
    pool, tokens = pooling(), stream()

    def explicit():
        rows = []
        for b in range(B):
            kept = [tokens[b, t] for t in range(T) if mask is None or mask[b, t]]
            rows.append(pooled(pool, kept, [sum(kept) / len(kept)] * len(kept)))
        return torch.stack(rows)

    agree(lambda: pool(tokens, mask), explicit, [tokens, pool.p, pool.q])


@pytest.mark.parametrize("name", ["p", "q"])
def test_without_affinity_it_is_mean_pooling_with_finite_gradients(name):
    pool, tokens = pooling(**{name: 0.0}), stream().requires_grad_()
    output = pool(tokens)
    torch.testing.assert_close(output, tokens.mean(1, keepdim=True).expand(-1, HEADS, -1))
    output.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (tokens, pool.p, pool.q))


def test_pooling_does_not_know_the_order_of_tokens():
    pool, tokens, order = pooling(), stream(), torch.randperm(T)
    torch.testing.assert_close(pool(tokens[:, order], MASK[:, order]), pool(tokens, MASK))


def test_padding_has_no_weight_and_all_weights_sum_to_one():
    weights = pooling().weights(stream(), MASK)
    assert weights.mT[~MASK].eq(0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS).double())
    assert (weights.mT[MASK].max() / weights.mT[MASK].min()) <= torch.e**2 + 1e-9


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_reads_pooled_vectors_through_each_tokens_gate(causal, mask, agree):
    layer, x = make(causal), stream()
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, causal, mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_pools_the_context(causal, agree):
    layer, x, context = make(causal, cross=True), stream(S), stream()
    inputs = [x, context, *layer.parameters()]
    agree(lambda: layer(x, context, key_mask=MASK), lambda: naive(layer, x, context, False, MASK), inputs)


def test_the_state_and_the_parameters_are_those_of_the_docstring():
    layer = make().float()
    heads = layer.pool.p.shape[1]
    assert layer.prefill(stream().float())[1].nbytes == B * 4 * (heads * (M + 1) + M) == B * layer.state_bytes(T)
    assert sum(p.numel() for p in layer.parameters()) == M * M + 3 * heads * M
    assert sum(p.numel() for p in layer.pool.parameters()) == 2 * M * heads


def test_one_head_is_refused():
    with pytest.raises(ValueError, match=r"num_heads must be at least 2 .* got 1"):
        LAMAPooling(M, 1)
