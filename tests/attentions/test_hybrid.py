"""Hybrids choose by layer, and the YAML rows nest factories that build."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from attentions.base import Attention, LayerSpec
from attentions.dense.softmax import Softmax
from attentions.hybrid import hybrid
from attentions.linear.based import Based
from attentions.local.sliding_window import SlidingWindow
from attentions.ssm.short_conv import ShortConv

ROWS = Path(__file__).parents[2] / "conf" / "attention"


def spec(layer):
    return LayerSpec(dim=42, num_heads=3, causal=True, layer=layer, num_layers=7)


def test_layers_take_turns():
    layers: list[Callable[[LayerSpec], Attention]] = [
        partial(ShortConv, kernel_size=3),
        Softmax,
        partial(SlidingWindow, window=5),
    ]
    stack = [hybrid(spec(layer), layers=layers) for layer in range(7)]
    assert [type(layer) for layer in stack] == [ShortConv, Softmax, SlidingWindow] * 2 + [ShortConv]
    assert stack[2].window == 5 and stack[4].spec.layer == 4


def test_a_hybrid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one mechanism"):
        hybrid(spec(0), layers=[])


@pytest.mark.parametrize(
    ("row", "classes"),
    [("hybrid", [ShortConv, Softmax]), ("based_hybrid", [ShortConv, Based, SlidingWindow])],
)
def test_the_rows_alternate_as_they_say(row, classes):
    factory = instantiate(OmegaConf.load(ROWS / f"{row}.yaml"))
    assert [type(factory(spec(layer))) for layer in range(2 * len(classes))] == classes * 2
