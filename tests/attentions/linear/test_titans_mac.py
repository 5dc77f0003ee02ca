"""Memory as context against eq. 21 to 25, one position and one key at a time; the memory itself has its own oracle."""

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.linear._neural_memory import predict
from attentions.linear.linear import Linear
from attentions.linear.titans_mac import MemoryAsContext, MemoryAsContextOfficial

B, M, H, P, C = 2, 12, 2, 3, 4


def stream(length, seed=2):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attended(mixer, query, keys):
    """Softmax attention of one query [M] over a list of inputs [M]."""
    width, heads = M // H, []
    for h in range(H):
        own = slice(h * width, (h + 1) * width)
        q = mixer.q_proj.weight[own] @ query
        k = torch.stack([mixer.k_proj.weight[own] @ key for key in keys])
        v = torch.stack([mixer.v_proj.weight[own] @ key for key in keys])
        heads.append((k @ q / width**0.5).softmax(0) @ v)
    return mixer.out_proj.weight @ torch.cat(heads)


def gated(layer, y, m):
    def norm(z, weight):
        return z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    return norm(y, layer.gate.attention_norm.weight) * F.silu(norm(m, layer.gate.memory_norm.weight) + layer.gate.bias)


def learned(memory, y, stop, mask):
    """Weights after the first `stop` positions of y, from the beginning."""
    state = memory.init_memory(len(y), y)
    if not stop:
        return state.weights
    y = y[:, :stop]
    seen = None if mask is None else mask[:, :stop]
    return memory.learn(state, *memory.key_value(y), y[:, :0].unflatten(2, (H, -1)), key_mask=seen, **memory.terms(y))[
        1
    ].weights


def naive(layer, x, mask=None):
    """One direction over x, whose masked positions are zero."""
    memory, two_sided, late = layer.memory, not layer.spec.causal, isinstance(layer, MemoryAsContextOfficial)
    rows = x.new_zeros(B, 0, M)
    visible = torch.ones(B, x.shape[1], dtype=torch.bool) if mask is None else mask
    for start in range(0, x.shape[1], C):
        stop = min(start + C, x.shape[1])
        weights = learned(memory, rows, start, mask)
        h = memory.merge(x, predict(weights, memory.query(x), memory.gain))
        segment = []
        for t in range(start, stop):
            read = [u for u in range(start, stop) if two_sided or u <= t]
            rowed = []
            for b in range(B):
                asked = range(start, stop) if late else read  # eq. 22 has all of h before S
                inner = [*layer.persistent, *(h[b, u] for u in asked if visible[b, u])]
                inner += [x[b, u] for u in read if visible[b, u]]
                rowed.append(attended(layer.mixer, x[b, t], inner) * visible[b, t])
            segment.append(torch.stack(rowed))
        rows = torch.cat([rows, torch.stack(segment, 1)], 1)
    outputs = []
    for t in range(x.shape[1]):
        start = t // C * C
        weights = learned(memory, rows, min(start + C, x.shape[1]) if late else start, mask)
        outputs.append(gated(layer, rows, memory.merge(rows, predict(weights, memory.query(rows), memory.gain)))[:, t])
    return torch.stack(outputs, 1)


@pytest.fixture
def make(make_layer):
    def layer(layer_class=MemoryAsContext, *, mixer=Softmax, **keywords):
        settings = dict(dim=M, num_heads=H, mixer=mixer, segment=C, num_persistent=P) | keywords
        return make_layer(layer_class, **settings)

    return layer


@pytest.mark.parametrize("layer_class", [MemoryAsContext, MemoryAsContextOfficial])
@pytest.mark.parametrize("depth", [1, 2])
def test_segments_equal_the_formula_position_by_position(layer_class, depth, make, agree):
    layer, x = make(layer_class, depth=depth), stream(11)  # two segments and a ragged one
    agree(lambda: layer(x), lambda: naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("layer_class", [MemoryAsContext, MemoryAsContextOfficial])
def test_masked_positions_are_neither_attended_to_nor_learned(layer_class, make, agree):
    layer, x = make(layer_class), stream(11)
    mask = torch.arange(11).expand(B, -1) % 5 < torch.tensor([[3], [4]])
    kept = mask[..., None]
    agree(
        lambda: layer(x, key_mask=mask) * kept,
        lambda: naive(layer, x * kept, mask) * kept,
        [x, *layer.parameters()],
    )


def test_noncausal_takes_segments_from_either_end(make, agree):
    layer, x = make(causal=False), stream(7)
    agree(lambda: layer(x), lambda: (naive(layer, x) + naive(layer, x.flip(1)).flip(1)) / 2, [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_asks_a_memory_of_the_context(causal, make, agree):
    layer, x, context = make(causal=causal, cross=True), stream(5), stream(9, 3)
    mask = torch.arange(9).expand(B, -1) != 4

    def want():
        memory, source = layer.memory, context * mask[..., None]
        weights = learned(memory, source, 9, mask)
        h = memory.merge(x, predict(weights, memory.query(x), memory.gain))
        y = [
            torch.stack([attended(layer.mixer, x[b, t], [*layer.persistent, h[b, t], x[b, t]]) for t in range(5)])
            for b in range(B)
        ]
        y = torch.stack(y)
        return gated(layer, y, memory.merge(y, predict(weights, memory.query(y), memory.gain)))

    agree(lambda: layer(x, context, key_mask=mask), want, [x, context, *layer.parameters()])


def test_the_official_gate_sees_later_positions_of_its_segment_and_the_strict_one_does_not(make):
    for layer_class, looks_ahead in ((MemoryAsContext, False), (MemoryAsContextOfficial, True)):
        layer, x = make(layer_class), stream(12)
        other = x.clone()
        other[:, 6:] = stream(12, 5)[:, 6:]
        moved = (layer(other) - layer(x)).abs().amax((0, 2)) > 1e-9
        assert moved[6:].all() and not moved[:4].any()
        assert moved[4:6].tolist() == [looks_ahead] * 2


@pytest.mark.parametrize("mixer", [Softmax, Linear])
@pytest.mark.parametrize("num_persistent", [0, 3])
def test_decoding_equals_all_at_once_whatever_attends(mixer, num_persistent, make):
    layer, x = make(mixer=mixer, num_persistent=num_persistent), stream(11)
    state, outputs = layer.init_state(B), []
    for t in range(11):
        output, state = layer.step(x[:, t : t + 1], state)
        outputs.append(output)
        assert state.nbytes == 2 * B * layer.state_bytes(t + 1)  # float64
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x))


def test_what_attends_gets_the_slot_of_its_inner_sequence():
    specs = []

    def mixer(spec):
        specs.append(spec)
        return Softmax(spec)

    spec = LayerSpec(dim=M, num_heads=H, causal=True, max_length=500, grid=(20, 25), layer=1, num_layers=3)
    MemoryAsContext(spec, mixer=mixer, segment=7, num_persistent=3)
    MemoryAsContext(LayerSpec(dim=M, num_heads=H, causal=False, cross=True), mixer=mixer, num_persistent=3)
    assert specs[0] == LayerSpec(dim=M, num_heads=H, causal=True, max_length=17, layer=1, num_layers=3)
    assert specs[1] == LayerSpec(dim=M, num_heads=H, causal=False, max_length=5)


def test_attention_passes_by_a_memory_that_is_still_empty():
    layer, x = MemoryAsContext(LayerSpec(dim=M, num_heads=H, causal=True)).double(), stream(11)
    assert layer(x)[:, 0].abs().min() > 1e-6
    torch.testing.assert_close(
        layer(x)[:, :16], layer.gate.attention_norm(attended_all(layer, x)) * F.silu(torch.ones(()))
    )


def attended_all(layer, x):
    inner = [*layer.persistent.double()]
    rows = []
    for b in range(B):
        for t in range(x.shape[1]):
            read = [z for u in range(t + 1) for z in (torch.zeros(M).double(), x[b, u])]
            rows.append(attended(layer.mixer, x[b, t], inner + read))
    return torch.stack(rows).reshape(x.shape)


def test_its_parameters_are_those_of_its_parts():
    layer = MemoryAsContext(LayerSpec(dim=M, num_heads=H, causal=True), mixer=Softmax, num_persistent=5)
    parts = sum(p.numel() for part in (layer.memory, layer.mixer) for p in part.parameters())
    assert sum(p.numel() for p in layer.parameters()) == parts + 5 * M + 3 * M
    assert layer.memory.chunk_size == layer.segment == 16


@pytest.mark.parametrize(("name", "least"), [("segment", 1), ("num_persistent", 0), ("depth", 1)])
def test_bad_values_are_refused(name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        MemoryAsContext(LayerSpec(dim=M, num_heads=H, causal=True), mixer=Softmax, **{name: least - 1})
