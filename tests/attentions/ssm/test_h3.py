"""H3 against its sum over pairs of positions, and its forms against each other."""

import pytest
import torch

from attentions.base import LayerSpec
from attentions.ssm.h3 import H3

B, T, S, M, N = 2, 7, 5, 12, 6


def kernels(layer, direction, head, length):
    """K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l), by repeated multiplication."""
    ssm = layer.ssm
    a = torch.complex(-ssm.log_decay[head].exp(), ssm.frequency[head])
    dt = ssm.log_dt[head].exp()
    coefficient = torch.complex(*ssm.C[direction, head].unbind(-1)) * ((dt * a).exp() - 1) / a
    taps = []
    for _ in range(length):
        taps.append(2 * coefficient.real.sum())
        coefficient = coefficient * (dt * a).exp()
    return taps


def naive(layer, x, source, causal, cross=False, key_mask=None):
    """y_t = q_t^T (sum_s K_{t-s} k~_s v_s^T + D k~_t v_t^T), k~_s = sum_i C_i k_{s-i} + D k_s; then the projection."""
    H, G, D = layer.spec.num_heads, layer.spec.kv_heads, layer.key_dim
    length, two_sided = source.shape[1], not causal and not cross
    rows = []
    for b in range(B):
        k, v = [], []
        for s in range(length):
            seen = 1.0 if key_mask is None or key_mask[b, s] else 0.0
            k.append(seen * (layer.k_proj.weight @ source[b, s] + layer.k_proj.bias).view(G, D))
            v.append(seen * (layer.v_proj.weight @ source[b, s] + layer.v_proj.bias).view(G, D))
        shifted = []
        for s in range(length):
            total = layer.shift.D * k[s]
            for r in range(length):
                if 0 <= s - r < N:
                    total = total + layer.shift.C[0, ..., s - r] * k[r]
                if two_sided and 0 <= r - s - 1 < N:
                    total = total + layer.shift.C[1, ..., r - s - 1] * k[r]
            shifted.append(total)
        for t in range(x.shape[1]):
            q = (layer.q_proj.weight @ x[b, t] + layer.q_proj.bias).view(H, D)
            now = length - 1 if cross else t  # in cross-attention every query reads at the end of the context
            heads = []
            for h in range(H):
                g = h * G // H
                forward = kernels(layer, 0, g, length)
                backward = kernels(layer, 1, g, length) if two_sided else None
                matrix = layer.ssm.D[g] * torch.outer(shifted[now][g], v[now][g])
                for s in range(length):
                    if s <= now:
                        matrix = matrix + forward[now - s] * torch.outer(shifted[s][g], v[s][g])
                    elif backward is not None:
                        matrix = matrix + backward[s - now - 1] * torch.outer(shifted[s][g], v[s][g])
                heads.append(q[h] @ matrix)
            rows.append(layer.out_proj.weight @ torch.cat(heads) + layer.out_proj.bias)
    return torch.stack(rows).reshape(B, x.shape[1], M)


@pytest.fixture
def make(make_layer):
    def make(num_heads=3, num_kv_heads=None, **keywords):
        layer = make_layer(H3, dim=M, num_heads=num_heads, num_kv_heads=num_kv_heads, state_dim=N, **keywords)
        return layer, torch.randn(B, T, M, dtype=torch.float64)

    return make


@pytest.mark.parametrize("in_scores", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_the_sum_over_pairs(causal, in_scores, make, agree):
    layer, x = make(causal=causal)
    layer.longest_in_scores = T if in_scores else 0
    agree(lambda: layer(x), lambda: naive(layer, x, x, causal), [x, *layer.parameters()])


@pytest.mark.parametrize("in_scores", [True, False])
def test_grouped_heads_share_keys_values_and_kernels(in_scores, make, agree):
    layer, x = make(num_heads=6, num_kv_heads=2)
    layer.longest_in_scores = T if in_scores else 0
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, True, key_mask=mask), inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_reads_at_the_end_of_the_context(causal, make, agree):
    layer, x = make(causal=causal, cross=True)
    context = torch.randn(B, S, M, dtype=torch.float64)
    mask = torch.tensor([[True] * S, [True, False, True, True, False]])
    inputs = [x, context, *layer.parameters()]
    for key_mask in (None, mask):
        agree(
            lambda m=key_mask: layer(x, context, key_mask=m),
            lambda m=key_mask: naive(layer, x, context, causal, cross=True, key_mask=m),
            inputs,
        )


def test_prefill_and_steps_equal_all_at_once(make):
    layer, _ = make()
    x = torch.randn(B, 23, M, dtype=torch.float64)
    want = layer(x)
    for prompt in (1, 4, 17):  # shorter and longer than the shift SSM
        output, state = layer.prefill(x[:, :prompt])
        torch.testing.assert_close(output, want[:, :prompt])
        for t in range(prompt, x.shape[1]):
            output, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.nbytes == 8 * B * (3 * 4 * 4 * N + (N - 1) * 12)  # float64: N D^2 a head and N - 1 keys


def test_it_recalls_a_value_by_its_key():
    """The paper's construction: a shift by one and a kernel that forgets nothing."""
    layer = H3(LayerSpec(dim=8, num_heads=1, causal=True), state_dim=2, bias=False).double()
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            projection.weight.copy_(torch.eye(8))
        layer.shift.C.copy_(torch.tensor([0.0, 1.0]).expand_as(layer.shift.C))
        layer.shift.D.zero_()
        layer.ssm.D.zero_()
        layer.ssm.log_dt.zero_()
        layer.ssm.log_decay.fill_(-30.0)
        layer.ssm.frequency.zero_()
        layer.ssm.C.copy_(torch.tensor([0.5, 0.0]).expand_as(layer.ssm.C))  # K_l = 2 * 0.5 * dt for every l
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 2]])  # pairs 0 -> 1, 2 -> 3, 4 -> 5; then 2 asks
    output = layer(torch.nn.functional.one_hot(tokens, 8).double())
    torch.testing.assert_close(output[0, -1], torch.nn.functional.one_hot(torch.tensor(3), 8).double())


def test_parameters_are_those_of_the_published_layer():
    layer = H3(LayerSpec(dim=64, num_heads=2, causal=True))
    ssms = 64 * 64 + 64 + 2 * (1 + 32 + 32 + 64 + 1)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 64**2 + 4 * 64 + ssms
    with pytest.raises(ValueError, match="must be even and positive, got 7; nearest: 6, 8"):
        H3(LayerSpec(dim=64, num_heads=2, causal=True), state_dim=7)
