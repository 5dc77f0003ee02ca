"""What holds for every member of the linear family: decoding, masks, precision, state size."""

import pytest
import torch

from attentions.base import LayerSpec
from attentions.linear.based import Based
from attentions.linear.delta_net import DeltaNet
from attentions.linear.gated_delta_net import GatedDeltaNet
from attentions.linear.gla import GatedLinearAttention
from attentions.linear.linear import Linear
from attentions.linear.retention import Retention

MEMBERS = [Linear, Based, Retention, GatedLinearAttention, DeltaNet, GatedDeltaNet]
B, T, M, H = 2, 37, 48, 6  # heads of width 8, keys of width 4 where halved


def make(member, dtype=torch.float64, num_kv_heads=None, causal=True, **keywords):
    torch.manual_seed(1)
    spec = LayerSpec(dim=M, num_heads=H, num_kv_heads=num_kv_heads, causal=causal, **keywords)
    return member(spec).to(dtype)


def stream(length=T, dtype=torch.float64):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rotary_base", [None, 10000.0])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("member", MEMBERS)
def test_step_by_step_equals_all_at_once_equals_prefill(member, num_kv_heads, rotary_base):
    layer, x = make(member, num_kv_heads=num_kv_heads, rotary_base=rotary_base), stream()
    layer.chunk_size = 8
    want = layer(x)
    state, outputs = layer.init_state(B), []
    for t in range(T):
        output, state = layer.step(x[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-8, atol=1e-9)
    half, middle = layer.prefill(x[:, :23])
    torch.testing.assert_close(half, want[:, :23], rtol=1e-8, atol=1e-9)
    for t in range(23, T):
        output, middle = layer.step(x[:, t : t + 1], middle)
        torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-8, atol=1e-9)
    assert middle.position == state.position == T
    torch.testing.assert_close(middle.memory, state.memory, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_prompt_shorter_than_the_convolution_can_be_prefilled(member):
    layer, x = make(member), stream(5)
    _, state = layer.prefill(x[:, :2])
    for t in range(2, 5):
        output, state = layer.step(x[:, t : t + 1], state)
    torch.testing.assert_close(output, layer(x)[:, -1:], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_step_leaves_the_state_it_was_given_alone(member):
    layer, x = make(member), stream(2)
    _, before = layer.step(x[:, :1], layer.init_state(B))
    copy = before.memory.clone()
    layer.step(x[:, 1:], before)
    assert before.memory.equal(copy) and before.position == 1


@pytest.mark.parametrize("member", MEMBERS)
def test_padding_on_the_left_changes_nothing(member):
    """The content of masked positions cannot matter if they act as if they were not there."""
    layer, x = make(member), stream()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, :9] = False
    padded = torch.cat([1e3 * x[:, :9], x[:, 9:]], dim=1)
    got = layer(padded, key_mask=mask)[:, 9:]
    # Retention rotates by absolute position in float32 angles, which a shift of 9 moves by 1e-6
    torch.testing.assert_close(got, layer(x[:, 9:]), rtol=1e-5, atol=1e-5 if member is Retention else 1e-9)


@pytest.mark.parametrize("member", MEMBERS)
def test_bfloat16_layers_and_autocast_stay_near_float64(member):
    layer, x = make(member), stream()
    want = layer(x).detach()
    # bf16 keeps 8 bits: 2^-8 per operation, a handful in a row
    largest = float(want.abs().max())
    low = make(member, torch.bfloat16)
    got, state = low.prefill(stream(dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05 * largest)
    single = make(member, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = single(stream(dtype=torch.float32))
        mixed.float().sum().backward()
    torch.testing.assert_close(mixed.double(), want, rtol=0.05, atol=0.05 * largest)
    assert all(parameter.grad.isfinite().all() for parameter in single.parameters())


@pytest.mark.parametrize(
    ("member", "numbers"),
    [
        (Linear, 6 * 8 * 9),
        (Based, 6 * 153 * 9),
        (Retention, 6 * 8 * 8),
        (GatedLinearAttention, 6 * 4 * 8),
        (DeltaNet, 6 * 8 * 8 + 3 * 3 * 48),
        (GatedDeltaNet, 6 * 4 * 8 + 3 * (24 + 24 + 48)),
    ],
)
def test_the_state_is_as_large_as_the_formula_says_at_any_length(member, numbers):
    layer = make(member, torch.float32)
    assert layer.prefill(stream(dtype=torch.float32))[1].nbytes == layer.init_state(B).nbytes == B * numbers * 4


@pytest.mark.parametrize("member", MEMBERS)
def test_grouped_heads_share_one_memory(member):
    assert make(member, num_kv_heads=2).init_state(B).memory.shape[1] == 2


@pytest.mark.parametrize("member", MEMBERS)
def test_cross_attention_decodes_from_the_context_written_once(member):
    layer, x, context = make(member, cross=True), stream(5), stream(23)
    mask = torch.arange(23).expand(B, -1) % 3 > 0
    want, state = layer(x, context, key_mask=mask), layer.init_state(B, context, key_mask=mask)
    for t in range(5):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("member", [member for member in MEMBERS if member.ordered])
def test_rotary_positions_tell_a_bidirectional_sequence_from_its_reverse(member):
    """Without positions the two runs merely swap; rotated q and k keep the sign of a distance in both."""
    x = stream()
    layer = make(member, causal=False, rotary_base=10000.0)
    assert not torch.allclose(layer(x.flip(1)).flip(1), layer(x), rtol=1e-3, atol=1e-3)
    if member is not Retention:  # which always rotates
        layer = make(member, causal=False)
        torch.testing.assert_close(layer(x.flip(1)).flip(1), layer(x), rtol=1e-9, atol=1e-10)
