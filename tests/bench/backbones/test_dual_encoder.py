"""The dual encoder: two encoders that share every weight, in one pass; features, masks and mistakes."""

from __future__ import annotations

import functools

import pytest
import torch
from hydra.utils import instantiate

from attentions.base import UnsupportedPattern
from attentions.dense.none import NoAttention
from attentions.dense.softmax import Softmax
from attentions.dense.uniform import Uniform
from attentions.linear.linear import Linear
from attentions.ssm.short_conv import ShortConv
from bench.backbones.base import build, pattern_of
from bench.backbones.dual_encoder import DualEncoder
from bench.backbones.encoder import Encoder
from bench.config import compose
from bench.errors import UserError
from tasks.base import Metric, PerSequence, PerToken, TaskSpec, Tokens, Vectors

B, L, S, V, C, F, M = 3, 13, 17, 23, 5, 2, 12
SHAPE = dict(dim=M, num_layers=2, num_heads=3, mlp_ratio=2, positions="learned", head_widths=[7, 4])
WORDS = Tokens(vocab_size=V)


def spec(inputs=WORDS, context=WORDS, *, per_sequence=True, causal=False) -> TaskSpec:
    return TaskSpec(
        inputs=inputs,
        output=PerSequence(num_classes=C) if per_sequence else PerToken(num_classes=V),
        length=L,
        causal=causal,
        context=context,
        context_length=S if context else None,
        metrics={"accuracy": Metric(unit="fraction", higher_is_better=True)},
        primary="accuracy",
        chance=1 / C,
    )


def model(task=None, attention=Softmax, seed=0, kind=DualEncoder, **changes):
    """In float64, with weights of order one."""
    network = build(functools.partial(kind, **SHAPE | changes), task or spec(), attention, seed).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def pair(task=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if task is not None and isinstance(task.inputs, Vectors):
        return tuple(torch.randn(B, length, F, generator=generator).double() for length in (L, S))
    return tuple(torch.randint(V, (B, length), generator=generator) for length in (L, S))


def masks():
    return torch.arange(L) % 4 > torch.arange(B)[:, None] - 1, torch.arange(S) < torch.tensor([[S], [9], [4]])


def looped(network, inputs, context, key_mask=None, context_mask=None, matched=True):
    """Every example of every sequence alone through the encoder, without padding; then the head by its formula."""
    ends = []
    for sequences, mask in ((inputs, key_mask), (context, context_mask)):
        end = []
        for i, sequence in enumerate(sequences):
            x = network.embedding(sequence[None])
            for layer in network.layers:
                x = layer(x, None if mask is None else mask[i : i + 1])
            x = x[0] if mask is None else x[0][mask[i]]
            x = {"mean": x.mean(0), "first": x[0], "last": x[-1]}[network.head.pooling]
            end.append(network.head.norm(x))
        ends.append(torch.stack(end))
    x1, x2 = ends
    compare = network.head.project
    x = torch.cat([x1, x2, x1 * x2, x1 - x2] if matched else [x1, x2], 1)
    for layer in compare.hidden:
        x = torch.clamp(x @ layer.weight.T + layer.bias, min=0)
    return (x @ compare.classes.weight.T + compare.classes.bias)[:, None]


@pytest.mark.parametrize("attention", [Softmax, Linear, Uniform, NoAttention])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", ["matched", "concatenated"])
def test_one_pass_equals_two_encoders_example_by_example(attention, masked, features):
    network = model(attention=attention, features=features)
    given = masks() if masked else (None, None)
    got = network(pair()[0], key_mask=given[0], context=pair()[1], context_mask=given[1])
    assert got.shape == (B, 1, C)
    torch.testing.assert_close(got, looped(network, *pair(), *given, matched=features == "matched"))


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_real_inputs_and_every_pooling_pass_the_same_way(pooling):
    task = spec(Vectors(dim=F), Vectors(dim=F))
    network = model(task, pooling=pooling)
    inputs, context = pair(task)
    torch.testing.assert_close(network(inputs, context=context), looped(network, inputs, context))
    given = masks()
    got = network(inputs, key_mask=given[0], context=context, context_mask=given[1])
    torch.testing.assert_close(got, looped(network, inputs, context, *given))


def test_sequences_of_one_length_need_no_mask():
    """So a mechanism without a path for masks, or with a slower one, is not sent there."""
    network, seen = model(), []
    network.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    inputs = pair()[0]
    got = network(inputs, context=inputs.flip(0))
    assert seen == [None]
    torch.testing.assert_close(got, looped(network, inputs, inputs.flip(0)))


def test_padding_of_either_side_is_not_read():
    network = model(alternate_with=functools.partial(ShortConv, kernel_size=3))
    inputs, context = pair()
    changed = [inputs.clone(), context.clone()]
    given = [torch.arange(L).expand(B, -1) < L - 3, torch.arange(S).expand(B, -1) < S - 5]
    changed[0][:, L - 3 :] = 1
    changed[1][:, S - 5 :] = 2
    want = network(inputs[:, : L - 3], context=context[:, : S - 5])
    torch.testing.assert_close(network(changed[0], key_mask=given[0], context=changed[1], context_mask=given[1]), want)
    for key_mask, context_mask in ((given[0], None), (None, given[1])):
        got = network(changed[0], key_mask=key_mask, context=changed[1], context_mask=context_mask)
        assert not torch.allclose(got, want)


def test_swapping_the_sequences_swaps_the_ends_and_nothing_else():
    network, seen = model(), []
    network.head.norm.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    inputs, context = pair()
    one, other = network(inputs, context=context), network(context, context=inputs)
    x1, x2 = seen[0].chunk(2)
    torch.testing.assert_close(seen[1], torch.cat([x2, x1]))
    assert not torch.allclose(one, other)  # x1 - x2 and the order of x1 and x2 tell them apart
    same = network(inputs, context=inputs)
    torch.testing.assert_close(same, looped(network, inputs, inputs))


def test_it_has_the_weights_of_one_encoder_and_starts_from_the_same_values():
    alone = dataclass_free(spec())
    dual = build(functools.partial(DualEncoder, **SHAPE), spec(), Softmax, 0)
    settings = {key: value for key, value in SHAPE.items() if key != "head_widths"}
    encoder = build(functools.partial(Encoder, **settings, tied_embeddings=False), alone, Softmax, 0)
    names = {name for name, _ in encoder.named_parameters() if not name.startswith("head.project")}
    extra = {name for name, _ in dual.named_parameters()} - names
    assert extra == {
        f"head.project.{part}.{kind}" for part in ("hidden.0", "hidden.1", "classes") for kind in ("weight", "bias")
    }
    for name in names:
        assert torch.equal(dual.get_parameter(name), encoder.get_parameter(name)), name
    assert dual.num_parameters - sum(dual.get_parameter(name).numel() for name in names) == 49 * 7 + 8 * 4 + 5 * 5


def dataclass_free(task):
    """The task of one sequence, as long as the longer one of the pair."""
    return TaskSpec(**{**vars(task), "length": S, "context": None, "context_length": None})


def test_gradients_reach_every_weight_from_both_sides():
    network = model(attention=Linear)
    network(pair()[0], context=pair()[1]).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in network.parameters())


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (spec(context=None), {}, "the task has no pairs; type backbone=encoder"),
        (spec(per_sequence=False), {}, "the task has no pairs; type backbone=encoder"),
        (
            spec(context=Tokens(vocab_size=V + 1)),
            {},
            "has one embedding for both sequences, got Tokens(vocab_size=23)",
        ),
        (spec(causal=True), {}, "the task forbids looking ahead"),
        (spec(), dict(features="matchd"), 'unknown backbone.features "matchd"; nearest: matched'),
        (spec(), dict(head_widths=[4, 0]), "backbone.head_widths must be whole numbers of at least 1, got [4, 0]"),
        (spec(), dict(pooling="men"), 'unknown backbone.pooling "men"; nearest: mean'),
    ],
)
def test_mistakes_are_one_line(task, changes, message):
    with pytest.raises(UserError) as caught:
        model(task, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dual_encoder", "dual_encoder_paper"])
def test_presets_build_know_their_pattern_and_do_not_decode(name):
    partial = instantiate(compose([f"backbone={name}"]).parts["backbone"], _convert_="all")
    assert pattern_of(partial) == "noncausal self"
    network = build(partial, spec(), Softmax, seed=0)
    assert network(pair()[0], context=pair()[1]).shape == (B, 1, C)
    with pytest.raises(UnsupportedPattern, match="does not decode"):
        network.init_state(1)
