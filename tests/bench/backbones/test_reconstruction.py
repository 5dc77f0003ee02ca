"""The head that rebuilds a sequence: what it reads, and what it must not."""

from __future__ import annotations

import math

import torch
from torch import nn

from bench.backbones.heads import make_head
from bench.backbones.reconstruction import ReconstructionHead, sinusoids
from tasks.base import Reconstruction, TaskSpec, Tokens


def head(length=7, dim=5, classes=3):
    torch.manual_seed(0)
    spec = TaskSpec(
        inputs=Tokens(vocab_size=classes),
        output=Reconstruction(num_classes=classes),
        length=length,
        causal=True,
        metrics={},
        primary="accuracy",
        chance=0.5,
    )
    return make_head(spec, nn.LayerNorm(dim), dim, "mean", nn.Embedding(classes, dim)).double()


def test_it_reads_the_last_state_and_nothing_else():
    x, other = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    other[:, -1] = x[:, -1]
    positions = torch.tensor([[0, 3, 6], [5, 1, 2]])
    model = head()
    assert isinstance(model, ReconstructionHead)
    assert torch.equal(model(x, positions), model(other, positions))
    other[:, -1] += torch.randn(5, dtype=torch.float64)
    assert not torch.allclose(model(x, positions), model(other, positions))


def test_the_last_state_is_the_last_unmasked_one():
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    both = head()(x, None, mask)
    torch.testing.assert_close(both[0], head()(x[:1])[0])
    torch.testing.assert_close(both[1, :4], head()(x[1:, :4])[0])


def test_answers_come_in_the_order_of_the_positions():
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    everywhere = head()(x)
    assert everywhere.shape == (2, 7, 3)
    picked = head()(x, torch.tensor([[6, 0], [2, 2]]))
    torch.testing.assert_close(picked[0], everywhere[0, [6, 0]])
    torch.testing.assert_close(picked[1], everywhere[1, [2, 2]])


def test_sinusoids_match_the_formula():
    table = sinusoids(11, 6)
    assert table.shape == (11, 6)
    for position, i in ((3, 0), (10, 2), (7, 1)):
        angle = position / 10000 ** (i / 2)
        assert math.isclose(table[position, i], math.sin(angle), abs_tol=1e-6)
        assert math.isclose(table[position, 3 + i], math.cos(angle), abs_tol=1e-6)
