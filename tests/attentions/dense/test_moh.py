"""Mixture-of-head attention as a sum over heads of gate, attention and rows of W_O, position by position."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from attentions.base import LayerSpec, auxiliary_losses
from attentions.dense.moh import MoH
from attentions.dense.softmax import Softmax

ROWS = Path(__file__).parents[3] / "conf" / "attention"
B, T, S, M, H = 2, 7, 5, 30, 3  # heads of width 10, split in two: six of width 5
CASES = {
    "no shared head": {"shared": 0.0, "active": 0.5},
    "one shared head": {"shared": 0.2, "active": 0.5},
    "two shared heads": {"shared": 0.33, "active": 0.8},
    "the paper's scale": {"shared": 0.33, "active": 0.8, "gate_scale": "paper"},
    "query norms": {"shared": 0.33, "active": 0.67, "router": "query_norm"},
}


def naive_gates(layer, x):
    """Gates [N] of one position x [M] from the docstring's formula, and (probabilities, chosen) of the routed heads."""
    shared, routed, top = layer.num_shared, layer.num_routed, layer.top_k
    heads, code = shared + routed, layer.gate_scale == "code"
    width = M // heads
    if layer.router == "query_norm":
        q = layer.q_proj.weight @ x
        norms = [q[i * width : (i + 1) * width].square().sum().sqrt() for i in range(shared, heads)]
        mean = sum(norms) / routed
        deviation = (sum((norm - mean) ** 2 for norm in norms) / (routed - 1)).sqrt()
        scores = [norm / deviation for norm in norms]
    else:
        scores = [row @ x for row in layer.routed_router.weight]
    total = sum(torch.exp(score) for score in scores)
    probabilities = [torch.exp(score) / total for score in scores]
    chosen = sorted(range(routed), key=lambda i: -float(probabilities[i].detach()))[:top]
    mass = sum(probabilities[i] for i in chosen)
    gates = []
    if layer.router == "query_norm":  # value 1 or 0, gradient of the probability
        hard = [p - p.detach() + (i in chosen) for i, p in enumerate(probabilities)]
        return [torch.ones(())] * shared + hard, probabilities, chosen
    kinds = torch.softmax(layer.kind_router.weight @ x, 0) if shared else (0, 0.5 if code else 1)
    own = torch.softmax(layer.shared_router.weight @ x, 0) if shared > 1 else [1.0]
    for i in range(shared):
        gates.append(kinds[0] * own[i] * (2 * shared if code else 1))
    for i in range(routed):
        scale = 2 * top / mass if code else 1
        gates.append(kinds[1] * probabilities[i] * scale * (i in chosen))
    return gates, probabilities, chosen


def naive(layer, x, source, causal, key_mask):
    heads = layer.num_shared + layer.num_routed
    width, groups = M // heads, layer.spec.kv_heads * layer.split
    rows = []
    for b in range(B):
        for t in range(x.shape[1]):
            gates, _, _ = naive_gates(layer, x[b, t])
            output = torch.zeros(M, dtype=x.dtype)
            for i in range(heads):
                g = i * groups // heads
                q = layer.q_proj.weight[i * width : (i + 1) * width] @ x[b, t]
                head, norm = torch.zeros(width, dtype=x.dtype), 0.0
                for j in range(t + 1 if causal else source.shape[1]):
                    if key_mask[b, j]:
                        k = layer.k_proj.weight[g * width : (g + 1) * width] @ source[b, j]
                        weight = torch.exp(q @ k / math.sqrt(width))
                        head = head + weight * (layer.v_proj.weight[g * width : (g + 1) * width] @ source[b, j])
                        norm = norm + weight
                if isinstance(norm, torch.Tensor):
                    output = output + gates[i] * (layer.out_proj.weight[:, i * width : (i + 1) * width] @ (head / norm))
            rows.append(output)
    return torch.stack(rows).reshape(B, -1, M)


def make(make_layer, **keywords):
    return make_layer(MoH, **{"dim": M, "num_heads": H, "min_heads": 5, "balance_weight": 0.0, **keywords})


@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize("case", CASES)
def test_each_head_joins_with_its_gate(case, num_kv_heads, make_layer, agree):
    layer = make(make_layer, num_kv_heads=num_kv_heads, **CASES[case])
    assert layer.top_k < layer.num_routed
    x = torch.randn(B, T, M, dtype=torch.float64)
    everything = torch.ones(B, T, dtype=torch.bool)
    agree(lambda: layer(x), lambda: naive(layer, x, x, True, everything), [x, *layer.parameters()])


@pytest.mark.parametrize(("causal", "cross"), [(False, False), (False, True), (True, True)])
def test_the_other_patterns_gate_by_the_query(causal, cross, make_layer, agree):
    layer = make(make_layer, causal=causal, cross=cross, **CASES["two shared heads"])
    x = torch.randn(B, S, M, dtype=torch.float64)
    source = torch.randn(B, T, M, dtype=torch.float64) if cross else x
    mask = torch.rand(B, source.shape[1], generator=torch.Generator().manual_seed(3)) > 0.3
    inputs = [x, *([source] if cross else []), *layer.parameters()]
    agree(
        lambda: layer(x, source if cross else None, key_mask=mask),
        lambda: naive(layer, x, source, False, mask),
        inputs,
    )


@pytest.mark.parametrize("rotary_base", [None, 100.0])
@pytest.mark.parametrize("shared", [0.0, 0.2, 0.5])
def test_zero_routers_with_all_heads_on_are_softmax_attention_of_as_many_heads(shared, rotary_base, make_layer):
    softmax = make_layer(Softmax, dim=36, num_heads=6, rotary_base=rotary_base)
    layer = make(make_layer, dim=36, shared=shared, active=1.0, rotary_base=rotary_base)
    assert layer.top_k == layer.num_routed
    assert layer.load_state_dict(softmax.state_dict(), strict=False).unexpected_keys == []
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "router" in name:
                parameter.zero_()
    x = torch.randn(B, T, 36, dtype=torch.float64)
    torch.testing.assert_close(layer(x), softmax(x))


def test_gates_of_one_are_softmax_attention(make_layer):
    layer = make(make_layer, shared=0.33, active=1.0, router="query_norm")
    softmax = make_layer(Softmax, dim=M, num_heads=2 * H)
    softmax.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, M, dtype=torch.float64)
    torch.testing.assert_close(layer(x), softmax(x))


def test_the_papers_zero_routers_scale_two_shared_and_six_routed_heads_by_a_quarter_and_a_twelfth():
    layer = MoH(LayerSpec(dim=32, num_heads=8, causal=True), shared=0.25, active=1.0, gate_scale="paper")
    torch.nn.init.zeros_(layer.kind_router.weight)
    torch.nn.init.zeros_(layer.shared_router.weight)
    torch.nn.init.zeros_(layer.routed_router.weight)
    gates = layer.gates(torch.randn(1, 1, 32))[0, 0]
    torch.testing.assert_close(gates, torch.tensor([1 / 4] * 2 + [1 / 12] * 6))


@pytest.mark.parametrize("case", ["one shared head", "query norms"])
def test_an_unselected_head_gives_its_part_of_the_output_projection_no_gradient(case, make_layer):
    layer = make(make_layer, **CASES[case])
    x = torch.randn(1, T, M, dtype=torch.float64)
    layer(x)[0, -1].square().sum().backward()
    gradient = layer.out_proj.weight.grad.unflatten(1, (6, 5)).abs().amax((0, 2))
    _, _, chosen = naive_gates(layer, x[0, -1])
    on = [i < layer.num_shared or i - layer.num_shared in chosen for i in range(6)]
    assert gradient.gt(0).tolist() == on


def test_an_unselected_query_norm_still_learns_from_the_straight_through_gate(make_layer):
    layer = make(make_layer, **CASES["query norms"])
    x = torch.randn(1, 1, M, dtype=torch.float64)
    layer(x).square().sum().backward()  # one position: scores are alike, queries learn through the gate alone
    _, _, chosen = naive_gates(layer, x[0, 0])
    gradient = layer.q_proj.weight.grad.unflatten(0, (6, 5)).abs().amax((1, 2))
    assert len(chosen) < layer.num_routed
    assert gradient[layer.num_shared :].gt(0).all()


@pytest.mark.parametrize("row", ["moh", "moh_75", "moh_paper"])
def test_the_router_of_a_row_learns_from_the_task(row, make_layer):
    layer = instantiate(OmegaConf.load(ROWS / f"{row}.yaml"))(LayerSpec(dim=32, num_heads=2, causal=True)).double()
    layer(torch.randn(B, T, 32, dtype=torch.float64)).square().sum().backward()
    assert layer.routed_router.weight.grad.abs().max() > 1e-6


def test_one_chosen_head_leaves_the_codes_router_to_the_balance_loss(make_layer):
    layer = make(make_layer, shared=0.2, active=0.4)
    assert layer.top_k == 1
    layer(torch.randn(B, T, M, dtype=torch.float64)).square().sum().backward()
    assert layer.routed_router.weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize("gate_scale", ["code", "paper"])
@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_the_balance_loss_is_the_products_of_mean_probability_and_share_of_tokens(gate_scale, router, make_layer):
    layer = make(make_layer, shared=0.33, active=0.67, router=router, gate_scale=gate_scale, balance_weight=0.01)
    x = torch.randn(B, T, M, dtype=torch.float64)
    layer.train()(x)
    mean, share = [0.0] * 4, [0.0] * 4
    for row in x.flatten(0, 1):
        _, probabilities, chosen = naive_gates(layer, row)
        for i in range(4):
            mean[i] += probabilities[i] / (B * T)
            share[i] += (i in chosen) / (B * T)
    expected = 0.01 * sum(p * f for p, f in zip(mean, share, strict=True)) * (4 if gate_scale == "code" else 1)
    torch.testing.assert_close(auxiliary_losses(layer)["moh_balance"], expected)
    layer.eval()(x)
    assert auxiliary_losses(layer) == {}


@pytest.mark.parametrize(("gate_scale", "expected"), [("code", 2.0), ("paper", 2 / 4)])
def test_uniform_routing_costs_top_k_by_the_code_and_its_share_by_the_paper(gate_scale, expected):
    spec = LayerSpec(dim=24, num_heads=6, causal=True, layer=1, num_layers=3)
    layer = MoH(spec, shared=0.33, active=0.67, gate_scale=gate_scale, balance_weight=1.0).train()
    torch.nn.init.zeros_(layer.routed_router.weight)
    layer.routed_router.weight.data[:, :4] = 1e-9 * torch.eye(4)  # breaks ties: the two largest inputs win
    x = torch.zeros(1, 4, 24)
    for t in range(4):
        x[0, t, [t, (t + 1) % 4]] = 1.0
    layer(x)
    torch.testing.assert_close(auxiliary_losses(layer)["moh_balance"], torch.tensor(expected / 3))  # mean over 3 layers


@pytest.mark.parametrize(
    ("num_heads", "min_heads", "shared", "active", "numbers"),
    [
        (2, 8, 0.25, 0.5, (2, 6, 2)),  # moh in small models: 4 of 8 heads
        (2, 8, 0.5, 0.75, (4, 4, 2)),  # moh_75, moh_query_norm
        (2, 4, 0.25, 0.5, (1, 3, 1)),  # moh_paper
        (32, 8, 0.5, 0.75, (16, 16, 8)),  # MoH-LLaMA3-8B
        (12, 4, 0.25, 0.5, (3, 9, 3)),
        (3, 1, 0.5, 0.75, (2, 1, 1)),  # halves round up
        (1, 1, 0.5, 0.75, (0, 1, 1)),  # one head is always routed, and on
    ],
)
def test_fractions_become_numbers_of_heads(num_heads, min_heads, shared, active, numbers):
    spec = LayerSpec(dim=64 * num_heads, num_heads=num_heads, causal=True)
    layer = MoH(spec, shared=shared, active=active, min_heads=min_heads)
    assert (layer.num_shared, layer.num_routed, layer.top_k) == numbers


def test_routers_add_one_row_per_head_and_two_and_the_cache_stays(make_layer):
    spec = LayerSpec(dim=32, num_heads=2, causal=True)
    layer, softmax = MoH(spec, shared=0.5, active=0.75, min_heads=4), Softmax(spec)
    count, plain = (sum(p.numel() for p in module.parameters()) for module in (layer, softmax))
    assert count == plain + 32 * (4 + 2)
    assert layer.state_bytes(T) == softmax.state_bytes(T)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shared": 0.8}, "shared=0.8 and active=0.75"),
        ({"active": 1.2}, "active=1.2"),
        ({"gate_scale": "mean"}, "gate_scale must be one of code, paper, got mean"),
        ({"router": "top"}, "router must be one of learned, query_norm, got top"),
        ({"min_heads": 0}, "at least 1, got 0; nearest: 1"),
        ({"min_heads": 31}, "3 heads of width 10 cannot be split into min_heads=31; nearest: 30"),
        ({"min_heads": 16, "rotary_base": 100.0}, r"even width \(rotary positions\); nearest: 15"),
        ({"router": "query_norm"}, "at least three routed heads.*got 1 of 3; nearest: min_heads=6"),
    ],
)
def test_settings_without_a_meaning_are_refused(keywords, message):
    spec = LayerSpec(dim=M, num_heads=H, causal=True, rotary_base=keywords.pop("rotary_base", None))
    with pytest.raises(ValueError, match=message):
        MoH(spec, **{"shared": 0.5, "active": 0.75, **keywords})
