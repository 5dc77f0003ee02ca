"""A block of a backbone holds the mechanism under test, and nothing else changes."""

import pytest
import torch
from hydra.utils import instantiate

from bench.backbones.base import build, pattern_of
from bench.config import compose
from tasks.base import Metric, PerToken, TaskSpec, Tokens

TASK = TaskSpec(
    inputs=Tokens(vocab_size=11),
    output=PerToken(num_classes=11),
    length=13,
    causal=True,
    metrics={"accuracy": Metric(unit="fraction", higher_is_better=True)},
    primary="accuracy",
    chance=1 / 11,
)


def model(*overrides):
    parts = compose(list(overrides)).parts
    backbone, attention = (instantiate(parts[part], _convert_="all") for part in ("backbone", "attention"))
    assert pattern_of(backbone) == "causal self"
    return build(backbone, TASK, attention, seed=0).double().eval()


@pytest.mark.parametrize("attention", ["softmax", "linear", "sliding_window"])
def test_the_mechanism_under_test_stands_inside_the_block_of_every_layer(attention):
    network = model("backbone=mambaout", f"attention={attention}")
    blocks = [layer.attention for layer in network.layers]
    assert [type(block).__name__ for block in blocks] == ["MambaOut"] * 2
    plain = model("backbone=bare_decoder", f"attention={attention}")
    assert {type(block.mixer) for block in blocks} == {type(layer.attention) for layer in plain.layers}
    assert [block.mixer.spec.layer for block in blocks] == [0, 1]


def test_a_stack_of_blocks_decodes_to_what_it_trains_on():
    network = model("backbone=mambaout", "attention=softmax")
    tokens = torch.randint(0, 11, (2, 13), generator=torch.Generator().manual_seed(0))
    expected, state = network(tokens), network.init_state(2)
    for t in range(13):
        output, state = network.step(tokens[:, t : t + 1], state)
        torch.testing.assert_close(output[:, 0], expected[:, t])


def test_the_blocks_own_weights_do_not_depend_on_the_mechanism_inside():
    one, other = (model("backbone=mambaout", f"attention={name}") for name in ("softmax", "s6"))
    for name, weight in one.named_parameters():
        if ".mixer." not in name:
            torch.testing.assert_close(weight, dict(other.named_parameters())[name], rtol=0, atol=0)
