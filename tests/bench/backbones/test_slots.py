"""Encoder, cross and encoder-decoder: who reads whom, masks, slots, decoding, heads, and mistakes in one line."""

from __future__ import annotations

import functools

import pytest
import torch
from hydra.utils import instantiate

from attentions.base import Pattern, UnsupportedPattern
from attentions.dense.none import NoAttention
from attentions.dense.softmax import Softmax
from attentions.dense.uniform import Uniform
from attentions.linear.linear import Linear
from attentions.ssm.short_conv import ShortConv
from bench.backbones.base import build, pattern_of
from bench.backbones.cross import Cross
from bench.backbones.decoder import Decoder
from bench.backbones.encoder import Encoder
from bench.backbones.encoder_decoder import EncoderDecoder
from bench.config import compose
from bench.errors import UserError
from tasks.base import Metric, PerSequence, PerToken, TaskSpec, Tokens

B, L, S, V, C = 2, 13, 17, 23, 5
CONV = functools.partial(ShortConv, kernel_size=3)


def spec(*, causal=False, context=True, per_sequence=False) -> TaskSpec:
    return TaskSpec(
        inputs=Tokens(vocab_size=V),
        output=PerSequence(num_classes=C) if per_sequence else PerToken(num_classes=V),
        length=L,
        causal=causal,
        context=Tokens(vocab_size=V) if context else None,
        context_length=S if context else None,
        metrics={"accuracy": Metric(unit="fraction", higher_is_better=True)},
        primary="accuracy",
        chance=1 / V,
    )


SHAPE = dict(dim=12, num_layers=2, num_heads=3, state_mixer="mlp", mlp_ratio=2)
DEEP = dict(**SHAPE, num_encoder_layers=2, others=Softmax)


def model(kind, task, attention=Softmax, seed=0, **settings):
    return build(functools.partial(kind, **settings), task, attention, seed).double().eval()


def tokens(length, seed=1):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


def moved(network, name, position, **inputs):
    """Positions of the output that change when one token of an input stream does."""
    changed = inputs[name].clone()
    changed[:, position] = (changed[:, position] + 1) % V
    before, after = network(**inputs), network(**{**inputs, name: changed})
    return set((before != after).any(-1).any(0).nonzero().flatten().tolist())


def test_an_encoder_reads_both_directions():
    network = model(Encoder, spec(context=False), **SHAPE, positions="rotary")
    for position in (0, 6, L - 1):
        assert moved(network, "inputs", position, inputs=tokens(L)) == set(range(L))


@pytest.mark.parametrize("attention", [Softmax, Linear, Uniform])
@pytest.mark.parametrize("pooling", ["mean", "first", "last", None])
def test_padding_changes_nothing_in_an_encoder(pooling, attention):
    """Masks travel from the batch to every layer and to the pooling: a padded row equals the row alone."""
    task = spec(context=False, per_sequence=pooling is not None)
    settings = dict(pooling=pooling) if pooling else {}
    network = model(Encoder, task, attention, **SHAPE, alternate_with=CONV, **settings)
    short, padded = tokens(L - 4), tokens(L)
    padded[:, : L - 4] = short
    mask = (torch.arange(L) < L - 4).expand(B, -1)
    got, want = network(padded, key_mask=mask), network(short)
    torch.testing.assert_close(got if pooling else got[:, : L - 4], want)
    assert not torch.allclose((got if pooling else got[:, : L - 4]), network(padded)[:, : want.shape[1]])
    assert want.shape == ((B, 1, C) if pooling else (B, L - 4, V))


@pytest.mark.parametrize(("pooling", "where"), [("first", 0), ("last", L - 1)])
def test_first_and_last_pooling_read_one_position(pooling, where):
    task = spec(context=False, per_sequence=True)
    network = model(Encoder, task, NoAttention, **SHAPE, pooling=pooling)
    for position in (0, 5, L - 1):
        assert bool(moved(network, "inputs", position, inputs=tokens(L))) == (position == where)
    left = (torch.arange(L) >= 3).expand(B, -1)  # padding on the left moves the first real position
    changed = tokens(L).clone()
    changed[:, 3 if pooling == "first" else L - 1] += 1
    assert not torch.equal(network(tokens(L), key_mask=left), network(changed % V, key_mask=left))


def test_mean_pooling_is_the_mean_over_real_positions():
    network = model(Encoder, spec(context=False, per_sequence=True), NoAttention, **SHAPE | dict(state_mixer="none"))
    mask = torch.arange(L) % 3 > 0
    x = network.embedding(tokens(L))
    want = network.head.project(network.head.norm(x[:, mask].mean(1)))
    torch.testing.assert_close(network(tokens(L), key_mask=mask.expand(B, -1))[:, 0], want)


@pytest.mark.parametrize("attention", [Softmax, Linear])
def test_queries_over_a_context_do_not_meet_and_padding_of_the_context_is_not_read(attention):
    network = model(Cross, spec(), attention, **SHAPE, context_mixer=CONV)
    for position in (0, 6):
        assert moved(network, "inputs", position, inputs=tokens(L), context=tokens(S, 2)) == {position}
        assert moved(network, "context", position, inputs=tokens(L), context=tokens(S, 2)) == set(range(L))
    short, padded = tokens(S - 5, 2), tokens(S, 3)
    padded[:, : S - 5] = short
    mask = (torch.arange(S) < S - 5).expand(B, -1)
    got = network(tokens(L), context=padded, context_mask=mask)
    torch.testing.assert_close(got, network(tokens(L), context=short))
    assert not torch.allclose(got, network(tokens(L), context=padded))


@pytest.mark.parametrize("slot", ["encoder_self", "decoder_self", "cross"])
def test_an_encoder_decoder_is_causal_in_its_stream_and_reads_the_whole_context(slot):
    network = model(EncoderDecoder, spec(causal=True), Linear, **DEEP, slot=slot, positions="rotary")
    for position in (0, 6):
        assert moved(network, "inputs", position, inputs=tokens(L), context=tokens(S, 2)) == set(range(position, L))
        assert moved(network, "context", S - 1 - position, inputs=tokens(L), context=tokens(S, 2)) == set(range(L))


def test_the_mechanism_fills_its_slot_and_softmax_the_others():
    for slot in EncoderDecoder.slots:
        network = model(EncoderDecoder, spec(causal=True), Linear, **DEEP, slot=slot, alternate_with=CONV)
        kinds = {
            "encoder_self": [type(layer.attention) for layer in network.encoder],
            "decoder_self": [type(layer.attention) for layer in network.decoder],
            "cross": [type(layer.cross) for layer in network.decoder],
        }
        want = {name: Linear if name == slot else Softmax for name in kinds}
        assert kinds.pop("encoder_self") == [ShortConv, want["encoder_self"]]
        assert kinds == {name: [want[name]] * 2 for name in kinds}
        patterns = {layer.cross.spec.pattern for layer in network.decoder}
        assert patterns == {Pattern.CAUSAL_CROSS}
        assert network.decoder[0].cross.spec.max_keys == S and network.encoder[1].attention.spec.max_keys == S


def test_without_attention_in_the_cross_slot_the_context_is_not_seen():
    network = model(EncoderDecoder, spec(causal=True), NoAttention, **DEEP, slot="cross")
    assert moved(network, "context", 4, inputs=tokens(L), context=tokens(S, 2)) == set()


@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
@pytest.mark.parametrize("attention", [Softmax, Linear, NoAttention])
def test_decoding_over_a_context_equals_the_forward_pass(positions, attention):
    network = model(
        EncoderDecoder, spec(causal=True), attention, **DEEP, slot="cross", positions=positions, alternate_with=CONV
    )
    context = tokens(S, 2)
    mask = (torch.arange(S) % 4 > 0).expand(B, -1)
    want = network(tokens(L), context=context, context_mask=mask)
    state, outputs = network.init_state(B, context, mask), []
    for t in range(L):
        logits, state = network.step(tokens(L)[:, t : t + 1], state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), want)
    assert state.position == L and state.nbytes > 0


def test_padding_of_the_context_is_not_read_by_an_encoder_decoder():
    network = model(EncoderDecoder, spec(causal=True), Linear, **DEEP, slot="encoder_self")
    short, padded = tokens(S - 5, 2), tokens(S, 3)
    padded[:, : S - 5] = short
    mask = (torch.arange(S) < S - 5).expand(B, -1)
    got = network(tokens(L), context=padded, context_mask=mask)
    torch.testing.assert_close(got, network(tokens(L), context=short))


@pytest.mark.parametrize(
    ("kind", "settings", "task"),
    [
        (Encoder, SHAPE, spec(context=False)),
        (Cross, SHAPE, spec()),
        (EncoderDecoder, dict(**DEEP, slot="cross"), spec(causal=True)),
    ],
)
def test_equal_seeds_give_equal_backbones_whatever_the_mechanism(kind, settings, task):
    one, other = (model(kind, task, attention, **settings) for attention in (Softmax, NoAttention))
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name)), name
    assert not torch.equal(one.embedding.tokens.weight, model(kind, task, seed=1, **settings).embedding.tokens.weight)


def test_noncausal_backbones_do_not_decode():
    for network in (model(Encoder, spec(context=False), **SHAPE), model(Cross, spec(), **SHAPE)):
        with pytest.raises(UnsupportedPattern, match="is noncausal and does not decode"):
            network.init_state(1)


@pytest.mark.parametrize(
    ("kind", "settings", "task", "message"),
    [
        (Decoder, SHAPE, spec(causal=True), "backbone decoder reads one sequence and the task has a context; type"),
        (Encoder, SHAPE, spec(), "backbone encoder reads one sequence and the task has a context; type"),
        (Encoder, SHAPE, spec(causal=True, context=False), "the task forbids looking ahead; type backbone=decoder"),
        (Cross, SHAPE, spec(context=False), "backbone cross reads a context and the task has none"),
        (Cross, SHAPE, spec(causal=True), "type backbone=encoder_decoder"),
        (Cross, SHAPE | dict(positions="rotary"), spec(), 'unknown backbone.positions "rotary"'),
        (EncoderDecoder, dict(**DEEP, slot="cross"), spec(context=False), "the task has none; type backbone=decoder"),
        (EncoderDecoder, dict(**DEEP, slot="corss"), spec(), 'unknown backbone.slot "corss"; nearest: cross'),
        (EncoderDecoder, dict(**DEEP, slot="cross"), spec(per_sequence=True), "the task has one label per sequence"),
        (Encoder, SHAPE | dict(pooling="men"), spec(context=False), 'unknown backbone.pooling "men"; nearest: mean'),
        (Cross, SHAPE | dict(num_layers=0), spec(), "backbone.num_layers must be at least 1, got 0"),
    ],
)
def test_a_backbone_that_does_not_fit_the_task_says_which_one_does(kind, settings, task, message):
    with pytest.raises(UserError) as caught:
        model(kind, task, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("conv_decoder", "causal self"),
        ("encoder", "noncausal self"),
        ("conv_encoder", "noncausal self"),
        ("cross", "noncausal cross"),
        ("encoder_decoder", "causal cross"),
    ],
)
def test_presets_build_and_know_the_pattern_of_their_slot(name, pattern):
    partial = instantiate(compose([f"backbone={name}"]).parts["backbone"], _convert_="all")
    assert pattern_of(partial) == pattern
    task = spec(causal="noncausal" not in pattern, context="cross" in pattern)
    network = build(partial, task, Softmax, seed=0)
    output = network(tokens(L), context=tokens(S, 2) if "cross" in pattern else None)
    output.square().sum().backward()
    assert output.shape == (B, L, V)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_hidden_layers_of_the_head_follow_the_pooling():
    task = spec(context=False, per_sequence=True)
    network = build(lambda *slot: Encoder(*slot, **SHAPE, head_widths=[7, 5]), task, Softmax, 0).double()
    inputs = torch.randint(task.inputs.vocab_size, (3, task.length))
    stream = []
    network.head.norm.register_forward_pre_hook(lambda _, arguments: stream.append(arguments[0]))
    logits = network(inputs)
    x = network.head.norm(stream[0])
    for layer in network.head.project.hidden:
        x = torch.einsum("bpi,oi->bpo", x, layer.weight).add(layer.bias).clamp_min(0)
    assert [layer.out_features for layer in network.head.project.hidden] == [7, 5]
    torch.testing.assert_close(network.head.project.classes(x), logits)
    with pytest.raises(UserError, match="head_widths needs a task with one label per sequence"):
        Encoder(spec(context=False), Softmax, **SHAPE, head_widths=[7])
    with pytest.raises(UserError, match=r"head_widths must be whole numbers of at least 1, got \[0\]"):
        Encoder(task, Softmax, **SHAPE, head_widths=[0])
