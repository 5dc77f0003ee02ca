"""The decoder: its formula, its size, its head, its decoding, its initial weights."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from attentions.base import Unsupported
from attentions.dense.none import NoAttention
from attentions.dense.softmax import Softmax
from attentions.hybrid import hybrid
from attentions.local.sliding_window import SlidingWindow
from attentions.ssm.short_conv import ShortConv
from bench.backbones.base import build
from bench.backbones.decoder import Decoder
from bench.config import compose
from bench.errors import UserError
from tasks.base import Metric, PerToken, TaskSpec, Tokens

B, L, V = 2, 37, 23


def spec(vocab: int = V, length: int = L) -> TaskSpec:
    return TaskSpec(
        inputs=Tokens(vocab_size=vocab),
        output=PerToken(num_classes=vocab),
        length=length,
        causal=True,
        metrics={"accuracy": Metric(unit="fraction", higher_is_better=True)},
        primary="accuracy",
        chance=1 / vocab,
    )


def decoder(attention=Softmax, *, vocab: int = V, seed: int = 0, **changes) -> Decoder:
    settings = dict(dim=12, num_layers=2, num_heads=3, state_mixer="mlp", mlp_ratio=2) | changes
    return build(lambda task, factory: Decoder(task, factory, **settings), spec(vocab), attention, seed).eval()


def tokens(vocab: int = V) -> torch.Tensor:
    return torch.randint(vocab, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dim", "expected"), [(64, 545_984), (128, 1_132_928)])
def test_parameter_counts_equal_those_of_zoology(dim, expected):
    """A short convolution and softmax attention with biases, tied embeddings of 8192 tokens (their printed counts)."""
    model = Decoder(
        spec(vocab=8192),
        lambda layer: Softmax(layer, bias=True),
        dim=dim,
        num_layers=2,
        num_heads=1,
        state_mixer="zoology_identity",
        alternate_with=lambda layer: ShortConv(layer, kernel_size=3),
    )
    assert model.num_parameters == expected


def test_zoology_identity_adds_the_second_norm_to_the_stream():
    """Oracle: the two-line formula of their block with its Identity state mixer."""
    model = decoder(state_mixer="zoology_identity", initialisation="scaled_normal")
    x = model.embedding.tokens.weight[tokens()]
    for layer in model.layers:
        x = x + layer.attention(layer.attention_norm(x))
        x = x + layer.state_norm(x)
    expected = F.layer_norm(x, (12,), model.head.norm.weight, model.head.norm.bias) @ model.embedding.tokens.weight.T
    torch.testing.assert_close(model(tokens()), expected)
    assert not torch.allclose(decoder(state_mixer="none")(tokens()), expected, atol=1e-2)


def test_projecting_only_labelled_positions_equals_the_full_projection():
    model = decoder().double()
    positions = torch.tensor([[3, 11, 36, 5, 0], [2, 2, 7, 13, 29]])
    some, full = model(tokens(), positions), model(tokens())
    assert some.shape == (B, 5, V)
    torch.testing.assert_close(some, full.gather(1, positions[..., None].expand(-1, -1, V)))
    gradients = [
        torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        for logits in (some, full.gather(1, positions[..., None].expand(-1, -1, V)))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
@pytest.mark.parametrize("attention", [Softmax, lambda s: SlidingWindow(s, window=5), NoAttention])
def test_decoding_token_by_token_equals_the_forward_pass(positions, attention):
    model = decoder(attention, positions=positions, alternate_with=lambda s: ShortConv(s, kernel_size=3)).double()
    state, outputs = model.init_state(B), []
    for t in range(L):
        logits, state = model.step(tokens()[:, t : t + 1], state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(tokens()))
    assert state.nbytes == sum(memory.nbytes for memory in state.layers)


@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
def test_positions_matter_only_where_asked(positions):
    """Without positions, softmax reads a set: swapping two earlier tokens leaves the last output unchanged."""
    model = decoder(positions=positions, num_layers=1).double()
    swapped = tokens().clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert (swapped != tokens()).any()
    same = torch.allclose(model(swapped)[:, -1], model(tokens())[:, -1], atol=1e-12)
    assert same == (positions == "none")


def test_learned_positions_refuse_longer_inputs():
    with pytest.raises(ValueError, match="learned positions end at 37, asked for 38"):
        decoder(positions="learned")(torch.zeros(1, 38, dtype=torch.int64))


def test_layers_alternate_with_the_second_mechanism():
    model = decoder(num_layers=4, alternate_with=lambda s: ShortConv(s, kernel_size=3))
    assert [type(layer.attention) for layer in model.layers] == [ShortConv, Softmax, ShortConv, Softmax]


def test_equal_seeds_give_equal_backbones_whatever_the_mechanism():
    one, other = decoder(Softmax), decoder(NoAttention)
    shared = {name for name, _ in other.named_parameters()} & {name for name, _ in one.named_parameters()}
    assert {"embedding.tokens.weight", "layers.0.state_mixer.fc1.weight", "layers.1.state_mixer.fc2.bias"} <= shared
    for name in shared:
        assert torch.equal(one.get_parameter(name), other.get_parameter(name)), name
    different = decoder(Softmax, seed=1)
    assert not torch.equal(one.embedding.tokens.weight, different.embedding.tokens.weight)
    assert not torch.equal(one.layers[0].attention.q_proj.weight, different.layers[0].attention.q_proj.weight)
    assert not torch.equal(one.layers[0].attention.q_proj.weight, one.layers[1].attention.q_proj.weight)


def test_scaled_normal_has_the_published_deviations():
    model = decoder(vocab=2000, dim=60, num_layers=8, initialisation="scaled_normal")
    layer = model.layers[3]
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.embedding.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (layer.attention.out_proj, layer.state_mixer.fc2):
        assert residual.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert layer.state_mixer.fc1.bias.abs().max() == 0


def test_native_keeps_what_a_mechanism_made_of_its_weights():
    class Marked(NoAttention):
        def __init__(self, layer):
            super().__init__(layer)
            self.mark = nn.Linear(5, 7)
            nn.init.constant_(self.mark.weight, 3.0)

    assert (decoder(Marked, initialisation="native").layers[0].attention.mark.weight == 3).all()
    assert (decoder(Marked, initialisation="scaled_normal").layers[0].attention.mark.weight != 3).all()
    assert decoder(vocab=5000, dim=60, initialisation="native").embedding.tokens.weight.std().item() == pytest.approx(
        60**-0.5, rel=0.05
    )


def test_dropouts_act_in_training_only():
    for changes in (dict(embedding_dropout=0.5), dict(residual_dropout=0.5)):
        model = decoder(**changes)
        torch.testing.assert_close(model(tokens()), model(tokens()))
        model.train()
        assert not torch.equal(model(tokens()), model(tokens()))


def test_mlp_ratio_zero_means_no_mlp():
    assert decoder(state_mixer="mlp", mlp_ratio=0).layers[0].state_mixer is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(positions="rotery"), 'unknown backbone.positions "rotery"; nearest: rotary'),
        (dict(state_mixer="identity"), 'unknown backbone.state_mixer "identity"; nearest: zoology_identity'),
        (dict(initialisation="nativ"), 'unknown backbone.initialisation "nativ"; nearest: native'),
    ],
)
def test_unknown_words_name_the_nearest(changes, message):
    with pytest.raises(UserError) as caught:
        decoder(**changes)
    assert str(caught.value) == message


def test_heads_that_do_not_divide_the_width_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="num_heads must divide dim, got dim=12 and num_heads=5; nearest: 4, 6"):
        decoder(num_heads=5)


def test_a_hybrid_that_would_lose_a_member_is_unsupported():
    """On a backbone that alternates by itself, the mechanism has one of the two layers."""
    stack = functools.partial(hybrid, layers=[functools.partial(ShortConv, kernel_size=3), Softmax])
    conv = functools.partial(ShortConv, kernel_size=3)
    assert [type(layer.attention) for layer in decoder(stack).layers] == [ShortConv, Softmax]
    with pytest.raises(Unsupported, match="a hybrid of 2 needs at least 2 layers, the backbone gives it 1"):
        decoder(stack, alternate_with=conv)
    four = decoder(stack, alternate_with=conv, num_layers=4).layers
    assert [type(layer.attention) for layer in four] == [ShortConv, ShortConv, ShortConv, Softmax]


def test_what_a_mechanism_draws_does_not_move_the_layers_around_it():
    conv = functools.partial(ShortConv, kernel_size=3)
    one, other = (
        decoder(m, alternate_with=conv, num_layers=4, initialisation="native") for m in (Softmax, NoAttention)
    )
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name)), name


@pytest.mark.parametrize("name", ["decoder", "conv_decoder"])
def test_every_preset_builds_and_learns_something(name):
    """One step of plain gradient descent on the presets' own models lowers the loss on its batch."""
    choice = compose([f"backbone={name}"])
    model = build(instantiate(choice.parts["backbone"], _convert_="all"), spec(), Softmax, seed=0)
    targets = torch.roll(tokens(), -1, dims=1)
    before = F.cross_entropy(model(tokens()).flatten(0, 1), targets.flatten())
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert F.cross_entropy(model(tokens()).flatten(0, 1), targets.flatten()) < before
