"""RCMHA as loops over rows, heads and positions: convolutions tap by tap, relative terms gathered one by one."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.rcmha import RCMHA
from attentions.dense.softmax import Softmax

B, T, S, M, H, D, LONGEST = 2, 7, 5, 18, 3, 6, 11


def make(*, causal=True, cross=False, num_kv_heads=None, seed=0):
    """A layer in float64 with all parameters of order one and a table longer than the sequence."""
    spec = LayerSpec(dim=M, num_heads=H, causal=causal, cross=cross, num_kv_heads=num_kv_heads, max_length=LONGEST)
    torch.manual_seed(seed)
    layer = RCMHA(spec).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def learning(layer):
    """All parameters but one: a constant added to every key changes no softmax."""
    return [parameter for name, parameter in layer.named_parameters() if name != "k_conv.bias"]


def naive(layer, x, source, key_mask=None):
    causal, cross, groups = layer.spec.causal, layer.spec.cross, layer.spec.kv_heads

    def convolved(projection, conv, inputs, head, mask):
        """[length, D] of one head: tap i of the kernel meets position t + i - 2 (noncausal: t + i - 1)."""
        rows = slice(head * D, (head + 1) * D)
        outputs = []
        for t in range(len(inputs)):
            total = conv.bias
            for tap in range(3):
                s = t + tap - (2 if causal else 1)
                if 0 <= s < len(inputs) and (mask is None or mask[s]):
                    value = projection.weight[rows] @ inputs[s]
                    value = value if projection.bias is None else value + projection.bias[rows]
                    total = total + conv.weight[:, tap] * value
            outputs.append(total)
        return torch.stack(outputs)

    rows = []
    for b in range(B):
        mask = None if key_mask is None else key_mask[b]
        heads = []
        for h in range(H):
            g = h * groups // H
            q = convolved(layer.q_proj, layer.q_conv, x[b], h, None if cross else mask)
            k = convolved(layer.k_proj, layer.k_conv, source[b], g, mask)
            v = convolved(layer.v_proj, layer.v_conv, source[b], g, mask)
            outputs = []
            for i in range(x.shape[1]):
                head, norm = torch.zeros(D, dtype=x.dtype), 0.0
                for j in range(i + 1 if causal and not cross else source.shape[1]):
                    if mask is None or mask[j]:
                        score = (q[i] + layer.query_bias[h]) @ k[j]
                        if not cross:
                            n = j - i + LONGEST - 1
                            score = score + q[i] @ layer.relative[h, n] + layer.relative_bias[h, n]
                        weight = torch.exp(score / math.sqrt(D))
                        head, norm = head + weight * v[j], norm + weight
                outputs.append(head / norm if isinstance(norm, torch.Tensor) else head)
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, dim=-1) @ layer.out_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_the_formula(causal, num_kv_heads, agree):
    layer = make(causal=causal, num_kv_heads=num_kv_heads)
    x = torch.randn(B, T, M, dtype=torch.float64)
    agree(lambda: layer(x), lambda: naive(layer, x, x), [x, *learning(layer)])


@pytest.mark.parametrize("causal", [True, False])
def test_masked_positions_are_neither_read_nor_convolved(causal, agree):
    layer = make(causal=causal)
    x = torch.randn(B, T, M, dtype=torch.float64)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # causal: the first two queries of row 0 see nothing
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, x, mask), [x, *learning(layer)])


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_convolves_without_distances(causal, agree):
    layer = make(causal=causal, cross=True)
    x, context = torch.randn(B, T, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.4
    inputs = [x, context, *learning(layer)]
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_shifted_products_are_the_gathered_ones(causal):
    layer = make(causal=causal)
    q = torch.randn(B, T, H, D, dtype=torch.float64)
    seen = []
    layer._biased = lambda q, k, v, bias, visible: seen.append(bias) or q
    layer._convolve = lambda conv, heads, tail, mask=None: heads
    layer.attend(q, q, q)
    for i in range(T):
        for j in range(i + 1 if causal else T):
            n = j - i + LONGEST - 1
            expected = torch.einsum("bhd,hd->bh", q[:, i], layer.relative[:, n]) + layer.relative_bias[:, n]
            torch.testing.assert_close(seen[0][:, :, i, j], expected / math.sqrt(D))


@pytest.mark.parametrize("causal", [True, False])
def test_an_identity_convolution_and_empty_tables_are_softmax_attention(causal):
    layer = make(causal=causal)
    softmax = Softmax(layer.spec).double()
    with torch.no_grad():
        for conv in (layer.q_conv, layer.k_conv, layer.v_conv):
            conv.weight.copy_(torch.eye(3)[2 if causal else 1])
            conv.bias.zero_()
        for parameter in (layer.v_proj.bias, layer.query_bias, layer.relative, layer.relative_bias):
            parameter.zero_()
    softmax.load_state_dict({name: layer.state_dict()[name] for name in softmax.state_dict()})
    x = torch.randn(B, T, M, dtype=torch.float64)
    torch.testing.assert_close(layer(x), softmax(x))


@torch.no_grad()
def test_a_segment_with_the_memory_of_an_earlier_one_is_one_long_segment():
    layer = make()
    x = torch.randn(B, LONGEST, M, dtype=torch.float64)
    _, memory = layer.prefill(x[:, :5])
    outputs = []
    for t in range(5, LONGEST):
        output, memory = layer.step(x[:, t : t + 1], memory)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x)[:, 5:])


def test_tables_start_at_zero_and_hold_a_row_per_distance():
    for causal, distances in ((True, LONGEST), (False, 2 * LONGEST - 1)):
        layer = RCMHA(LayerSpec(dim=M, num_heads=H, causal=causal, max_length=LONGEST))
        assert layer.relative.shape == (H, distances, D)
        assert not any(p.any() for p in (layer.relative, layer.relative_bias, layer.query_bias))
        plain = 4 * M * M + M
        count = sum(parameter.numel() for parameter in layer.parameters())
        assert count == plain + H * (distances * (D + 1) + D) + 12 * D


def test_the_state_is_softmax_attentions_and_two_projections_of_each_stream():
    layer = make(num_kv_heads=1)
    assert layer.state_bytes(T) == 4 * (T * 2 * D + 2 * (H + 2) * D)


def test_positions_beyond_the_table_are_refused():
    with pytest.raises(ValueError, match="max_length=11 sets the distances, got 12 positions"):
        make()(torch.randn(1, 12, M, dtype=torch.float64))
