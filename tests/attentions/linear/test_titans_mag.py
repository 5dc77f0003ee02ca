"""Memory as gate and memory as layer against eq. 26 to 31, one key at a time; the memory itself has its own oracle."""

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.linear.titans_mag import MemoryAsGate, PrefixWindow
from attentions.linear.titans_mal import MemoryAsLayer

B, M, H, P, W = 2, 12, 2, 3, 4


def stream(length, seed=2):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def windowed(attention, x, prefix, causal, visible):
    """Softmax attention of each position over those less than W away, and the first `prefix` ones."""
    width, rows = M // H, []
    for b in range(B):
        for t in range(x.shape[1]):
            near = [u for u in range(x.shape[1]) if abs(t - u) < W or u < prefix]
            read = [u for u in near if visible[b, u] and (u <= t or not causal)]
            heads = []
            for h in range(H):
                own = slice(h * width, (h + 1) * width)
                q = attention.q_proj.weight[own] @ x[b, t]
                k = torch.stack([attention.k_proj.weight[own] @ x[b, u] for u in read])
                v = torch.stack([attention.v_proj.weight[own] @ x[b, u] for u in read])
                heads.append((k @ q / width**0.5).softmax(0) @ v)
            rows.append(attention.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).reshape(x.shape)


def norm(z, weight):
    return z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def naive(layer, x, mask=None):
    inner = torch.stack([torch.cat([layer.persistent, row]) for row in x])
    visible = torch.ones(inner.shape[:2], dtype=torch.bool)
    if mask is not None:
        visible[:, P:] = mask
    remembered = layer.memory(inner, key_mask=visible)
    if isinstance(layer, MemoryAsLayer):
        return windowed(layer.window, inner + remembered, 0, layer.spec.causal, visible)[:, P:]
    y = windowed(layer.window, inner, P, layer.spec.causal, visible)
    gate = F.silu(norm(remembered, layer.gate.memory_norm.weight) + layer.gate.bias)
    return (norm(y, layer.gate.attention_norm.weight) * gate)[:, P:]


@pytest.fixture
def make(make_layer):
    def layer(layer_class, **keywords):
        settings = dict(dim=M, num_heads=H, window=W, num_persistent=P, chunk_size=3) | keywords
        return make_layer(layer_class, **settings)

    return layer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layer_class", [MemoryAsGate, MemoryAsLayer])
def test_they_equal_the_formula(layer_class, causal, make, agree):
    layer, x = make(layer_class, causal=causal), stream(11)
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("layer_class", [MemoryAsGate, MemoryAsLayer])
def test_masked_positions_are_neither_attended_to_nor_learned(layer_class, make, agree):
    layer, x = make(layer_class, depth=2), stream(11)
    mask = torch.arange(11).expand(B, -1) % 5 < torch.tensor([[3], [4]])
    kept = mask[..., None]
    inputs = [x, *layer.parameters()]
    agree(lambda: layer(x, key_mask=mask) * kept, lambda: naive(layer, x, mask) * kept, inputs)


@pytest.mark.parametrize("layer_class", [MemoryAsGate, MemoryAsLayer])
@pytest.mark.parametrize("num_persistent", [0, 3, 6])
def test_decoding_equals_all_at_once(layer_class, num_persistent, make):
    layer, x = make(layer_class, num_persistent=num_persistent), stream(11)
    state, outputs = layer.init_state(B), []
    for t in range(11):
        output, state = layer.step(x[:, t : t + 1], state)
        outputs.append(output)
        assert state.nbytes == 2 * B * layer.state_bytes(t + 1)  # float64
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x))


def test_the_state_stops_growing_with_the_window():
    spec = LayerSpec(dim=M, num_heads=H, causal=True)
    gate, layer = (c(spec, window=W, num_persistent=P) for c in (MemoryAsGate, MemoryAsLayer))
    assert gate.state_bytes(W) == gate.state_bytes(500) == layer.state_bytes(500) + 4 * P * 2 * M
    assert gate.state_bytes(W - 1) < gate.state_bytes(W)


def test_a_window_of_everything_with_a_prefix_is_softmax_attention(make_layer):
    layer, x = make_layer(PrefixWindow, dim=M, num_heads=H, window=9, prefix=2), stream(9)
    softmax = Softmax(layer.spec).double()
    softmax.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), softmax(x))


@pytest.mark.parametrize("layer_class", [MemoryAsGate, MemoryAsLayer])
@pytest.mark.parametrize(("name", "least"), [("window", 1), ("num_persistent", 0), ("chunk_size", 1)])
def test_bad_values_are_refused(layer_class, name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        layer_class(LayerSpec(dim=M, num_heads=H, causal=True), **{name: least - 1})
