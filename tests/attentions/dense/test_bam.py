"""BAM as E softmax attentions run one after another and mixed, each a loop over rows, heads and positions."""

import math

import pytest
import torch

from attentions.base import LayerSpec, rotary
from attentions.dense.bam import BAM, upcycle
from attentions.dense.softmax import Softmax

B, T, S, M, H, D, E = 2, 7, 5, 18, 3, 6, 2


def expert_weights(layer, e):
    """W_q [H, D, M], W_k and W_v [G, D, M], W_o [M, H, D] of expert e."""
    groups, experts = layer.spec.kv_heads, layer.num_experts
    shape = (groups, 1, D, M) if layer.share_kv else (groups, experts, D, M)
    k, v = layer.k_proj.weight.view(shape), layer.v_proj.weight.view(shape)
    own = 0 if layer.share_kv else e
    q, out = layer.q_proj.weight.view(H, experts, D, M), layer.out_proj.weight.view(M, H, experts, D)
    return q[:, e], k[:, own], v[:, own], out[:, :, e]


def naive(layer, x, source, causal, key_mask):
    base, groups = layer.spec.rotary_base, layer.spec.kv_heads

    def turned(vector, position):
        if base is None or layer.spec.cross:
            return vector
        return rotary(vector[None, None, None], base=base, start=position)[0, 0, 0]

    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            scores = torch.exp(layer.router.weight @ x[b, i])
            output = torch.zeros(M, dtype=x.dtype)
            for e in range(layer.num_experts):
                w_q, w_k, w_v, w_o = expert_weights(layer, e)
                for h in range(H):
                    g = h * groups // H
                    q = turned(w_q[h] @ x[b, i], i)
                    head, norm = torch.zeros(D, dtype=x.dtype), 0.0
                    for j in range(i + 1 if causal else source.shape[1]):
                        if key_mask is None or key_mask[b, j]:
                            weight = torch.exp(q @ turned(w_k[g] @ source[b, j], j) / math.sqrt(D))
                            head, norm = head + weight * (w_v[g] @ source[b, j]), norm + weight
                    if isinstance(norm, torch.Tensor):
                        output = output + scores[e] / scores.sum() * (w_o[:, h] @ (head / norm))
            rows.append(output)
    return torch.stack(rows).reshape(B, -1, M)


@pytest.mark.parametrize(("num_kv_heads", "rotary_base"), [(3, None), (3, 100.0), (1, 100.0)])
@pytest.mark.parametrize("share_kv", [False, True])
def test_each_expert_attends_on_its_own_and_joins_with_its_gate(share_kv, num_kv_heads, rotary_base, make_layer, agree):
    slot = {"dim": M, "num_heads": H, "num_kv_heads": num_kv_heads, "rotary_base": rotary_base}
    layer = make_layer(BAM, num_experts=E, share_kv=share_kv, **slot)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True, None), [x, *layer.parameters()])


@pytest.mark.parametrize(("causal", "cross"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("share_kv", [False, True])
def test_the_other_patterns_gate_by_the_query(share_kv, causal, cross, make_layer, agree):
    layer = make_layer(BAM, dim=M, num_heads=H, causal=causal, cross=cross, num_experts=E, share_kv=share_kv)
    x = torch.randn(B, S, M, dtype=torch.float64)
    source = torch.randn(B, T, M, dtype=torch.float64) if cross else x
    mask = torch.rand(B, source.shape[1], generator=torch.Generator().manual_seed(3)) > 0.3
    inputs = [x, *([source] if cross else []), *layer.parameters()]
    context = source if cross else None
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, source, False, mask), inputs)


def branch(make_layer, seed, **slot):
    return make_layer(Softmax, dim=M, num_heads=H, seed=seed, **slot)


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("slot", [{}, {"num_kv_heads": 1, "rotary_base": 100.0}])
def test_identical_branches_reproduce_the_seed_for_any_router(slot, share_kv, make_layer):
    seed = branch(make_layer, 0, **slot)
    layer = upcycle(seed.spec, [seed.state_dict()] * 4, share_kv=share_kv)
    x = torch.randn(B, T, M, dtype=torch.float64)
    for _ in range(3):
        torch.nn.init.normal_(layer.router.weight)
        torch.testing.assert_close(layer(x), seed(x))


@pytest.mark.parametrize("slot", [{}, {"num_kv_heads": 1, "rotary_base": 100.0}])
def test_a_gate_on_one_expert_is_that_branch(slot, make_layer):
    branches = [branch(make_layer, seed, **slot) for seed in range(3)]
    layer = upcycle(branches[0].spec, [dense.state_dict() for dense in branches])
    x = torch.randn(B, T, M, dtype=torch.float64)
    x[..., 0] = 1.0
    for e, dense in enumerate(branches):
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[e, 0] = 1e3
        torch.testing.assert_close(layer(x), dense(x))


def test_shared_keys_and_values_are_the_mean_of_the_branches(make_layer):
    branches = [branch(make_layer, seed) for seed in range(3)]
    layer = upcycle(branches[0].spec, [dense.state_dict() for dense in branches], share_kv=True)
    mean = sum(dense.k_proj.weight for dense in branches) / 3
    torch.testing.assert_close(layer.k_proj.weight, mean)


def test_the_router_of_an_upcycled_layer_is_random():
    spec = LayerSpec(dim=M, num_heads=H, causal=True)
    torch.manual_seed(0)
    weights = Softmax(spec).state_dict()
    first, second = (upcycle(spec, [weights] * 2).router.weight for _ in range(2))
    assert first.std() > 0
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("share_kv", "parameters", "state"), [(False, 4 * E, E), (True, 2 * E + 2, 1)])
def test_parameters_and_state_grow_with_the_experts(share_kv, parameters, state):
    spec = LayerSpec(dim=M, num_heads=H, causal=True)
    layer = BAM(spec, num_experts=E, share_kv=share_kv)
    assert sum(p.numel() for p in layer.parameters()) == parameters * M * M + M * E
    assert layer.state_bytes(T) == state * Softmax(spec).state_bytes(T)


def test_bad_settings_and_branches_are_refused(make_layer):
    spec = LayerSpec(dim=M, num_heads=H, causal=True)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0; nearest: 1"):
        BAM(spec, num_experts=0)
    with pytest.raises(ValueError, match="at least one branch, got 0"):
        upcycle(spec, [])
    with pytest.raises(ValueError, match=r"branch 1 does not fit the slot: k_proj\.bias.*q_proj\.weight \[18, 18\]"):
        upcycle(spec, [Softmax(spec).state_dict(), Softmax(spec, bias=True).state_dict()])
    with pytest.raises(ValueError, match="even key width"):
        BAM(LayerSpec(dim=15, num_heads=3, causal=True, rotary_base=100.0), num_experts=2)
