"""TransNormerLLM's mixer against eqs. 9 to 11 and 14, with scores taken from pairs of positions."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.linear.transnormer import TransNormer

B, T, M, H = 2, 13, 60, 6
WIDTH = M // H


def silu(x):
    return x * x.sigmoid()


def naive(layer, x, context=None, key_mask=None):
    """a_ij = sum_c q_c k_c cos(theta_c (i - j)) lambda^|i - j|; [Norm(a V) * U] W_o over the visible j."""
    source = x if context is None else context
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own, shared = slice(h * WIDTH, (h + 1) * WIDTH), slice(g * WIDTH, (g + 1) * WIDTH)
                q, total = silu(layer.q_proj.weight[own] @ x[b, i]), torch.zeros(WIDTH, dtype=x.dtype)
                for j in range(i + 1 if context is None and layer.spec.causal else source.shape[1]):
                    if key_mask is None or key_mask[b, j]:
                        k = silu(layer.k_proj.weight[shared] @ source[b, j])
                        score = q * k
                        if layer.theta is not None:
                            score = score * (layer.theta[g] * (i - j)).cos()
                        kept = 1.0 if layer.spec.cross else math.exp(layer.log_decays[g] * abs(i - j))
                        total = total + kept * score.sum() * (layer.v_proj.weight[shared] @ source[b, j])
                heads.append(total)
            o = torch.cat(heads)
            normed = o / (o.square().mean() + 1e-6).sqrt()
            rows.append(layer.out_proj.weight @ (normed * (layer.gate_proj.weight @ x[b, i])))
    return torch.stack(rows).reshape(x.shape)


@pytest.fixture
def make():
    """A float64 layer at a depth, with parameters of order one."""

    def build(layer=0, **keywords):
        spec_keys = {"causal", "cross", "num_kv_heads", "rotary_base"} & keywords.keys()
        slot = {"causal": True} | {key: keywords.pop(key) for key in spec_keys}
        torch.manual_seed(0)
        module = TransNormer(LayerSpec(dim=M, num_heads=H, layer=layer, num_layers=3, **slot), **keywords).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return module

    return build


def stream(length=T):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("layer", "schedule"), [(0, "chunk"), (0, "tiled"), (1, "chunk")])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_causal_self_attention_equals_the_paper_s_scores(num_kv_heads, layer, schedule, make, agree):
    module = make(layer, num_kv_heads=num_kv_heads, schedule=schedule)
    module.chunk_size = 5
    x = stream()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.2
    mask[:, 0] = True
    agree(lambda: module(x, key_mask=mask), lambda: naive(module, x, key_mask=mask), [x, *module.parameters()])


@pytest.mark.parametrize("layer", [0, 1])
def test_noncausal_self_attention_has_the_same_scores_to_either_side(layer, make, agree):
    module, x = make(layer, causal=False, num_kv_heads=2), stream()
    agree(lambda: module(x), lambda: naive(module, x), [x, *module.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_has_no_distance(causal, make, agree):
    module, x, context = make(causal=causal, cross=True), stream(5), torch.randn(B, 11, M, dtype=torch.float64)
    assert module.theta is None
    agree(lambda: module(x, context), lambda: naive(module, x, context), [x, context, *module.parameters()])


@pytest.mark.parametrize("layer", [0, 2])
def test_step_by_step_equals_all_at_once_equals_prefill(layer, make):
    module, x = make(layer, num_kv_heads=2), stream(37)
    module.chunk_size = 8
    want, state, outputs = module(x), module.init_state(B), []
    for t in range(37):
        output, state = module.step(x[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-8, atol=1e-9)
    _, middle = module.prefill(x[:, :23])
    for t in range(23, 37):
        output, middle = module.step(x[:, t : t + 1], middle)
        torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-8, atol=1e-9)


def test_the_first_layer_alone_has_angles_and_they_start_as_published():
    first, later = (TransNormer(LayerSpec(dim=M, num_heads=H, causal=True, layer=i, num_layers=3)) for i in (0, 1))
    assert first.theta is not None
    torch.testing.assert_close(first.theta.flatten(), 10000.0 ** (-2 * torch.arange(M) / M))
    assert later.theta is None
    count = [sum(parameter.numel() for parameter in module.parameters()) for module in (first, later)]
    assert count == [5 * M * M + M, 5 * M * M]
    for module, width in ((first, 2 * WIDTH), (later, WIDTH)):
        assert module.init_state(B).nbytes == B * module.state_bytes(T) == B * H * width * WIDTH * 4


def test_rotary_positions_of_the_backbone_do_not_enter(make):
    torch.testing.assert_close(make(1, rotary_base=10000.0)(stream()), make(1)(stream()))
