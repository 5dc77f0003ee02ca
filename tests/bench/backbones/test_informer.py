"""Informer: slots, masks, distilling, what a step reads, one layer by hand, and mistakes in one line."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from attentions.base import Pattern, UnsupportedPattern
from attentions.dense.none import NoAttention
from attentions.dense.softmax import Softmax
from attentions.linear.linear import Linear
from attentions.sparse.prob_sparse import ProbSparse
from bench.backbones.base import build, pattern_of
from bench.backbones.informer import Distiller, Informer, SeriesEmbedding, sinusoids
from bench.config import compose
from bench.errors import UserError
from tasks.base import Metric, PerToken, TaskSpec, Tokens, Values, Vectors

B, L, S, V, K = 2, 13, 17, 3, 2  # K calendar marks
SHAPE = dict(dim=12, num_encoder_layers=3, num_layers=2, num_heads=3, mlp_ratio=2, others=Softmax)


def spec(**changes) -> TaskSpec:
    inputs = Vectors(dim=V + K, num_marks=K)
    facts = dict(
        inputs=inputs,
        output=Values(num_values=V),
        length=L,
        causal=False,
        context=inputs,
        context_length=S,
        metrics={"mse": Metric(unit="", higher_is_better=False)},
        primary="mse",
        chance=1.0,
    )
    return TaskSpec(**facts | changes)


def model(attention=Softmax, seed=0, task=None, **settings):
    settings = SHAPE | dict(slot="cross") | settings
    return build(functools.partial(Informer, **settings), task or spec(), attention, seed).double().eval()


def numbers(length, seed=1):
    return torch.randn(B, length, V + K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(network, name, position, channel=0, **inputs):
    """Positions of the output that change when one number of an input stream does."""
    changed = inputs[name].clone()
    changed[:, position, channel] += 1
    before, after = network(**inputs), network(**{**inputs, name: changed})
    return set((before != after).any(-1).any(0).nonzero().flatten().tolist())


def test_the_mechanism_fills_its_slot_and_softmax_the_others():
    for slot in Informer.slots:
        network = model(Linear, slot=slot)
        kinds = {
            "encoder_self": [layer.attention for layer in network.encoder],
            "decoder_self": [layer.attention for layer in network.decoder],
            "cross": [layer.cross for layer in network.decoder],
        }
        for name, layers in kinds.items():
            assert {type(layer) for layer in layers} == {Linear if name == slot else Softmax}
            assert {layer.spec.pattern for layer in layers} == {Informer.slots[name]}
            assert [layer.spec.layer for layer in layers] == list(range(len(layers)))
    assert pattern_of(functools.partial(Informer, slot="cross")) == "noncausal cross"


@pytest.mark.parametrize("distilling", [True, False])
def test_distilling_halves_the_length_between_encoder_layers(distilling):
    network = model(ProbSparse, distilling=distilling)
    seen = []
    for layer in network.encoder:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    network(numbers(L), context=numbers(S, 2))
    want = [17, 9, 5] if distilling else [17, 17, 17]
    assert seen == want == [layer.attention.spec.max_length for layer in network.encoder]
    assert network.decoder[0].cross.spec.max_keys == want[-1]


def test_a_distiller_is_convolution_norm_elu_and_pool():
    distiller = Distiller(5).double().eval()
    distiller.norm.running_mean.normal_()
    x = torch.randn(B, 7, 5, dtype=torch.float64)
    got, mask = distiller(x)
    weight, bias = distiller.convolution.weight, distiller.convolution.bias
    around = torch.stack([x.roll(1, 1), x, x.roll(-1, 1)], 3)  # the last position stands before the first
    y = torch.einsum("blik,oik->blo", around, weight) + bias
    y = F.elu((y - distiller.norm.running_mean) / (distiller.norm.running_var + 1e-5).sqrt())
    want = torch.stack([y[:, max(0, 2 * i - 1) : 2 * i + 2].amax(1) for i in range(4)], 1)
    torch.testing.assert_close(got, want)
    assert mask is None


def test_one_layer_of_each_kind_by_hand():
    network = model(num_encoder_layers=1, num_layers=1, positions="sinusoidal")
    inputs, context = numbers(L), numbers(S, 2)

    def embedded(embedding, x):
        values = x[..., :V]
        around = torch.stack([values.roll(1, 1), values, values.roll(-1, 1)], 3)
        y = torch.einsum("blik,oik->blo", around, embedding.values.weight) + embedding.values.bias
        return y + x[..., V:] @ embedding.marks.weight.T + sinusoids(x.shape[1], 12).double()

    def attended(layer, q, k, causal=False):
        q, k, v = (
            project(x).unflatten(2, (3, 4)).transpose(1, 2)
            for project, x in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, k))
        )
        scores = q @ k.mT / 2
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        return layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    first, second = network.encoder[0], network.decoder[0]
    c = embedded(network.context_embedding, context)
    normed = first.attention_norm(c)
    c = c + attended(first.attention, normed, normed)
    c = network.context_norm(c + first.state_mixer(first.state_norm(c)))
    x = embedded(network.embedding, inputs)
    normed = second.attention_norm(x)
    x = x + attended(second.attention, normed, normed, causal=True)
    x = x + attended(second.cross, second.cross_norm(x), c)
    x = x + second.state_mixer(second.state_norm(x))
    places = torch.tensor([[4, 11], [0, 12]])
    want = network.head.project(network.head.norm(x))[torch.arange(B)[:, None], places]
    torch.testing.assert_close(network(inputs, places, context=context), want)


def test_a_step_reads_the_whole_window_and_no_later_step():
    network = model(Linear, value_kernel=1)
    for position in (0, 6):
        streams = dict(inputs=numbers(L), context=numbers(S, 2))
        assert moved(network, "inputs", position, **streams) == set(range(position, L))
        assert moved(network, "inputs", position, V, **streams) == set(range(position, L))  # a mark
        assert moved(network, "context", position, **streams) == set(range(L))
    wide = model(Linear, value_kernel=3)  # the convolution reads one position further, and round the end
    assert moved(wide, "inputs", 6, inputs=numbers(L), context=numbers(S, 2)) == set(range(5, L))
    assert moved(wide, "inputs", 6, V, inputs=numbers(L), context=numbers(S, 2)) == set(range(6, L))


def test_without_attention_in_the_cross_slot_the_window_is_not_seen():
    network = model(NoAttention)
    assert moved(network, "context", 4, inputs=numbers(L), context=numbers(S, 2)) == set()


@pytest.mark.parametrize("attention", [Softmax, Linear, ProbSparse])
@pytest.mark.parametrize("slot", ["encoder_self", "cross"])
def test_what_stands_under_a_mask_is_not_read(slot, attention):
    network = model(attention, slot=slot, num_encoder_layers=2)
    mask = (torch.arange(S) < S - 5).expand(B, -1)
    one, other = numbers(S, 2), numbers(S, 2)
    other[:, S - 5 :, :V] = 7.0
    got, want = (network(numbers(L), context=context, context_mask=mask) for context in (other, one))
    torch.testing.assert_close(got, want)
    assert not torch.allclose(network(numbers(L), context=other), network(numbers(L), context=one))


def test_equal_seeds_give_equal_networks_whatever_the_mechanism_and_the_slot():
    one = model(Linear, slot="encoder_self")
    for other in (model(NoAttention), model(Linear, slot="encoder_self")):
        for name, parameter in other.named_parameters():
            if not any(part in name for part in (".attention.", ".cross.")):
                assert torch.equal(parameter, one.get_parameter(name)), name
    assert not torch.equal(one.embedding.values.weight, model(seed=1).embedding.values.weight)


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
def test_positions_are_added(positions):
    embedding = SeriesEmbedding(Vectors(dim=V), L, 12, 3, positions, 0.0)
    x = torch.zeros(B, L, V)
    got = embedding(x) - embedding.values.bias
    want = {"none": torch.zeros(L, 12), "sinusoidal": sinusoids(L, 12)}.get(positions)
    want = embedding.positions.weight if want is None else want
    torch.testing.assert_close(got, want.expand(B, -1, -1))
    assert sinusoids(5, 6)[3, 2:4].tolist() == pytest.approx(
        [torch.tensor(3 / 10000 ** (2 / 6)).sin().item(), torch.tensor(3 / 10000 ** (2 / 6)).cos().item()]
    )


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        ({}, spec(context=None), "the task has none; type backbone=encoder"),
        ({}, spec(output=PerToken(num_classes=3)), "takes real numbers to values; type backbone=encoder_decoder"),
        ({}, spec(inputs=Tokens(vocab_size=3)), "takes real numbers to values"),
        ({}, spec(causal=True), "answers all steps at once; type backbone=encoder_decoder"),
        (dict(slot="corss"), spec(), 'unknown backbone.slot "corss"; nearest: cross'),
        (dict(positions="rotary"), spec(), 'unknown backbone.positions "rotary"'),
        (dict(value_kernel=4), spec(), "backbone.value_kernel must be odd, got 4; nearest: 3"),
        (dict(num_encoder_layers=0), spec(), "backbone.num_encoder_layers must be at least 1, got 0"),
        (dict(num_heads=5), spec(), "num_heads must divide dim, got dim=12 and num_heads=5"),
    ],
)
def test_a_network_that_cannot_be_is_one_line(settings, task, message):
    with pytest.raises(UserError) as caught:
        model(task=task, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_it_answers_at_once_and_does_not_decode():
    with pytest.raises(UnsupportedPattern, match="does not decode"):
        model().init_state(1)


@pytest.mark.parametrize(
    ("name", "pattern", "context"),
    [
        ("informer", "noncausal cross", True),
        ("informer_paper", "noncausal self", True),
        ("series_decoder", "causal self", False),
    ],
)
def test_presets_build_and_every_weight_learns(name, pattern, context):
    partial = instantiate(compose([f"backbone={name}"]).parts["backbone"], _convert_="all")
    assert pattern_of(partial) == pattern
    network = build(partial, spec() if context else spec(context=None), Softmax, seed=0)
    output = network(numbers(L).float(), context=numbers(S, 2).float() if context else None)
    output.square().sum().backward()
    assert output.shape == (B, L, V)
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert Pattern.NONCAUSAL_CROSS.names()[0] == "noncausal cross"
