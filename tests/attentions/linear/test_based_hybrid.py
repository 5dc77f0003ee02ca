"""The hybrid in the published order: the 360M model's layers by name."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from attentions.base import Attention, LayerSpec, Unsupported
from attentions.linear.based import Based
from attentions.local.sliding_window import SlidingWindow
from attentions.ssm.base_conv import BaseConv

ROW = Path(__file__).parents[3] / "conf" / "attention" / "based_hybrid_paper.yaml"


def layers(count):
    factory = instantiate(OmegaConf.load(ROW), _convert_="all")
    return [factory(LayerSpec(dim=60, num_heads=6, causal=True, layer=i, num_layers=count)) for i in range(count)]


def test_the_order_is_that_of_the_360m_model_but_for_its_last_layer():
    made = [type(layer) for layer in layers(27)]
    published: list[type[Attention]] = [BaseConv] * 27
    for i in (1, 6, 11, 16, 21):
        published[i], published[i + 1] = Based, SlidingWindow
    assert made[:26] == published[:26]
    assert made[26] is Based


def test_fewer_layers_than_one_round_are_refused():
    with pytest.raises(Unsupported, match="a hybrid of 5 needs at least 5 layers, the backbone gives it 4"):
        layers(4)
