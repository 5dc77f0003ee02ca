"""The contract is proven on mechanisms that break it, each caught by the check that names its fault."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest
import torch
from faulty import FAULTS
from faulty.causality import OffByOneMask, RankedKeys

from attentions.base import LayerSpec, Pattern
from attentions.dense.softmax import Softmax
from bench import contract
from bench.contract import CHECKS, run


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_the_check_that_names_it(fault):
    checks = dict.fromkeys(["patterns", fault.check])
    outcomes = run(fault.factory, fault.name, config=fault.config, plugins=["faulty"], checks=list(checks))
    found = [outcome.detail for outcome in outcomes if outcome.check == fault.check and outcome.status == "fail"]
    assert any(re.search(fault.saying, detail) for detail in found), found or "nothing was found"
    assert fault.check == "patterns" or not [o for o in outcomes if o.check == "patterns" and o.status == "fail"]


def test_every_check_catches_some_planted_fault():
    modules = [
        importlib.import_module(f"bench.contract.{found.name}") for found in pkgutil.iter_modules(contract.__path__)
    ]
    written = {name.removeprefix("check_") for module in modules for name in vars(module) if name.startswith("check_")}
    assert {fault.check for fault in FAULTS} == set(CHECKS) == written


def test_softmax_passes_every_check():
    class Exact(Softmax):
        full_budget = staticmethod(lambda length: {"dropout": 0.0})

    config = {"_target_": "attentions.dense.softmax.Softmax", "_partial_": True, "dropout": 0.0, "bias": False}
    outcomes = run(Exact, "softmax", config=config)
    assert {(outcome.check, outcome.detail) for outcome in outcomes if outcome.status != "pass"} == set()
    assert {outcome.check for outcome in outcomes} == set(CHECKS)
    assert {outcome.pattern for outcome in outcomes} == {"every pattern", *Pattern.ALL.names()}


def test_an_error_inside_a_mechanism_is_a_finding_and_the_other_checks_go_on():
    class Broken(Softmax):
        def forward(self, x, context=None, *, key_mask=None):
            if key_mask is not None:
                raise RuntimeError("no masks\nhere")
            return super().forward(x, context)

    statuses = {(o.check, o.status, o.detail) for o in run(Broken, "broken", checks=["key_mask", "gradients"])}
    assert statuses == {("key_mask", "fail", "raises RuntimeError: no masks here"), ("gradients", "pass", "")}


def test_a_declared_reason_skips_decoding_checks_with_its_words():
    class ByDesign(Softmax):
        stepwise = "chunks follow the length"

    outcomes = run(ByDesign, "by_design", checks=["step_by_step", "prefill", "state_apart", "state_bytes"])
    assert {(o.status, o.detail) for o in outcomes} == {
        ("skip", "decoding differs from training by design: chunks follow the length")
    }


def test_a_declared_leak_is_named_and_skips_the_look():
    class Confessed(OffByOneMask):
        leaks = "position t reads t + 1"

    (outcome,) = [o for o in run(Confessed, "confessed", checks=["no_look_ahead"]) if o.pattern == "causal self"]
    assert (outcome.status, outcome.detail) == ("skip", "it looks ahead, as declared: position t reads t + 1")


def test_a_hybrid_is_checked_in_every_kind_of_layer():
    def alternate(spec: LayerSpec):
        return (OffByOneMask if spec.layer % 3 == 2 else Softmax)(spec)

    outcomes = run(alternate, "alternate", checks=["no_look_ahead"])
    assert {o.pattern: o.status for o in outcomes if "self" in o.pattern} == {
        "causal self, layer 0": "pass",
        "causal self, layer 2": "fail",
    }


def test_ranked_keys_leak_without_a_gradient():
    """Why look-ahead is tested by substitution: autograd sees nothing of this leak."""
    layer = RankedKeys(LayerSpec(dim=15, num_heads=3, causal=True)).double()
    x = torch.randn(2, 37, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    layer(x)[:, :20].square().sum().backward()
    assert x.grad is not None
    assert x.grad[:, :20].any() and not x.grad[:, 20:].any()
