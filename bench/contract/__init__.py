"""What every mechanism must satisfy, seen from outside: nothing is known of it but `attentions.base`.

A check `check_<name>` takes a factory (LayerSpec -> Attention) and a slot, and raises ContractError with one line: what
differs, where, by how much; what it returns is a remark. Where it does not apply it raises NotApplicable with the
reason. The first line of its docstring is its description. All of it runs in float64 unless said otherwise, in
seconds, and on the CPU but for `device`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attentions.base import Pattern
from bench.contract import causality, decoding, device, independence, interface, numerics
from bench.contract.comparing import ContractError, NotApplicable
from bench.contract.layers import Factory, slots, unbuildable

__all__ = ["CHECKS", "Check", "ContractError", "NotApplicable", "Outcome", "run"]

CAUSAL = Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS


@dataclass(frozen=True)
class Check:
    """One contract. `where`: patterns it is about; None: the mechanism as a whole, once, with its YAML."""

    function: Callable[..., str | None]
    where: Pattern | None = Pattern.ALL

    @property
    def name(self) -> str:
        return self.function.__name__.removeprefix("check_")

    @property
    def description(self) -> str:
        return (self.function.__doc__ or "").partition("\n")[0]


CHECKS = {
    check.name: check
    for check in (
        Check(interface.check_yaml_keys, None),
        Check(interface.check_patterns, None),
        Check(causality.check_no_look_ahead, CAUSAL),
        Check(causality.check_mixing),
        Check(causality.check_grid),
        Check(decoding.check_step_by_step, CAUSAL),
        Check(decoding.check_prefill, CAUSAL),
        Check(decoding.check_state_apart, CAUSAL),
        Check(independence.check_key_mask),
        Check(independence.check_batch_rows),
        Check(interface.check_shapes),
        Check(numerics.check_gradients),
        Check(numerics.check_precision),
        Check(numerics.check_full_budget),
        Check(interface.check_same_seed),
        Check(interface.check_state_dict),
        Check(interface.check_dropout),
        Check(independence.check_heads),
        Check(decoding.check_state_bytes, CAUSAL),
        Check(device.check_device),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What a check found in one slot; `detail` is the error, the reason of a skip, or a remark."""

    attention: str
    check: str
    pattern: str
    status: str  # pass, fail or skip
    detail: str
    seconds: float


def run(
    factory: Factory,
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
    checks: Sequence[str] = (),
) -> list[Outcome]:
    """All checks (or those named in `checks`) in every declared slot.

    Args:
        factory: makes the layer of a slot, such as the class itself or what `_partial_: true` gives.
        name: of the row, for the outcomes.
        config: the row's YAML as a dictionary, for the check of its keys; plugins: packages it may name.
    """
    chosen = [CHECKS[check] for check in checks or CHECKS]
    outcomes = [
        _attempt(check, name, "every pattern", factory, config, plugins) for check in chosen if check.where is None
    ]
    for label, spec in slots(factory).items() if any(check.where for check in chosen) else ():
        here = [check for check in chosen if check.where and spec.pattern in check.where]
        if reason := unbuildable(factory, spec):  # said once, by `patterns`
            outcomes += [Outcome(name, check.name, label, "skip", f"no layer: {reason}", 0.0) for check in here]
        else:
            outcomes += [_attempt(check, name, label, factory, spec) for check in here]
    return outcomes


def _attempt(check: Check, name: str, label: str, *arguments: Any) -> Outcome:
    start = time.perf_counter()
    try:
        status, detail = "pass", check.function(*arguments) or ""
    except NotApplicable as reason:
        status, detail = "skip", str(reason)
    except ContractError as error:
        status, detail = "fail", str(error)
    except Exception as error:  # whatever a mechanism raises is a finding, and the other checks go on
        status, detail = "fail", f"raises {type(error).__name__}: {error}"
    return Outcome(name, check.name, label, status, " ".join(detail.split()), time.perf_counter() - start)
