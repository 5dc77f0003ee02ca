"""Equal terms: data, order and initial weights do not depend on the mechanism; the same seed gives the same bits."""

import csv
import dataclasses
import itertools

import pytest
import sweeping
import torch
from omegaconf import OmegaConf

from attentions.base import UnsupportedPattern
from attentions.dense.softmax import Softmax
from bench import cell as cell_module
from bench import efficiency, training
from bench.backbones.base import build
from bench.cell import make_task
from bench.errors import ImpossibleCell
from bench.store import Store


def run(cell, results, replicas=None):
    """All replicas of a cell, in this process; the table and the loss histories without their times."""
    store = Store(results)
    store.prepare()
    events = []
    facts = {"command": "test"}
    cell_module.run(cell, replicas or cell.replicas, store, facts, lambda event, **data: events.append((event, data)))
    histories = {}
    for run_id in sweeping.records(results):
        with (store.attempts(run_id)[-1] / "history.csv").open() as file:
            histories[run_id] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    return sweeping.table(results), histories, events


@pytest.fixture(scope="module")
def cell():
    return sweeping.cell(
        "attention=softmax", "attention.dropout=0.25", "seed=[0,1]", "budget.learning_rates=[0.01,0.03]"
    )


@pytest.fixture(scope="module")
def reference(cell, tmp_path_factory):
    return run(cell, tmp_path_factory.mktemp("reference"))


def test_the_same_seed_gives_the_same_bits(cell, reference, tmp_path):
    again = run(cell, tmp_path)
    assert again[0] == reference[0] and again[1] == reference[1] and len(again[0]) == 4
    assert len({str(history) for history in reference[1].values()}) == 4  # and another seed or rate gives others


def test_the_order_of_replicas_and_what_ran_before_do_not_matter(cell, reference, tmp_path):
    torch.manual_seed(12345)
    torch.randn(7)
    turned = run(cell, tmp_path / "turned", cell.replicas[::-1])
    assert turned[:2] == reference[:2]
    alone = run(cell, tmp_path / "alone", cell.replicas[2:3])
    for part, whole in zip(alone[:2], reference[:2], strict=True):
        assert part == {cell.replicas[2].run_id: whole[cell.replicas[2].run_id]}


def test_events_tell_the_life_of_every_replica(cell, reference):
    by_run = {run_id: [event for event, data in reference[2] if data["run_id"] == run_id] for run_id in reference[0]}
    assert all(events == ["start", "step", "step", "done"] for events in by_run.values()) and len(by_run) == 4


def test_the_data_of_a_run_follow_from_task_and_seed_alone(reference, tmp_path):
    other = run(sweeping.cell("attention=none", "seed=[0,1]", "backbone.dim=10"), tmp_path)[0]
    by_seed = {record["seed"]: record["data"] for record in other.values()}
    assert all(record["data"] == by_seed[record["seed"]] for record in reference[0].values())
    assert by_seed[0] != by_seed[1]
    splits = [by_seed[0][split][0]["inputs"] for split in ("train", "valid", "test")]
    assert len(set(splits)) == 3


def test_a_mechanism_edited_after_planning_is_not_run_under_the_old_name(cell, tmp_path):
    edited = dataclasses.replace(cell, source_hash="of the code as it was planned")
    with pytest.raises(ImpossibleCell, match=r"the code of softmax.* has changed since the sweep was planned; type"):
        run(edited, tmp_path)
    assert sweeping.records(tmp_path) == {}


class Hungry(Softmax):
    """Draws random numbers of its own wherever it can."""

    def __init__(self, spec):
        torch.randn(11)
        super().__init__(spec)
        torch.randn(13)

    def forward(self, x, context=None, *, key_mask=None):
        torch.randn(3)
        return super().forward(x, context, key_mask=key_mask)


def batches_seen(attention, monkeypatch):
    """Inputs of every batch that a training asks for."""
    cell = sweeping.cell("seed=3")
    task = make_task(cell.parts["task"])
    splits = {split: task.segments(split, 3) for split in ("train", "valid")}
    from bench.backbones.decoder import Decoder

    network = build(
        lambda spec, factory: Decoder(spec, factory, dim=6, num_layers=2, num_heads=1), task.spec, attention, seed=3
    )
    seen: list[torch.Tensor] = []

    def recording(*arguments):
        step = make_step(*arguments)

        def recorded(batch, rate):
            seen.append(batch.inputs.clone())
            return step(batch, rate)

        return recorded

    make_step = training.make_step
    with monkeypatch.context() as patch:
        patch.setattr(training, "make_step", recording)
        training.train(network, task, splits, cell.budget, 0.01, 3, torch.device("cpu"))
    return seen


def test_the_order_of_batches_does_not_depend_on_the_mechanism(monkeypatch):
    calm, hungry = batches_seen(Softmax, monkeypatch), batches_seen(Hungry, monkeypatch)
    assert len(calm) == 4 and all(torch.equal(a, b) for a, b in zip(calm, hungry, strict=True))
    assert not torch.equal(calm[0], calm[1])


def test_epochs_shuffle_every_example_once_each_time_and_follow_the_seed():
    task = make_task(sweeping.cell().parts["task"])
    segments = task.segments("train", 0)

    def rows(seed, count):
        batches = itertools.islice(training.epochs(task, segments, 7, seed), count)
        return [tuple(row) for batch in batches for row in batch.inputs.tolist()]

    examples = sorted(map(tuple, segments[0].inputs.tolist()))
    first, second = rows(0, 8)[:23], rows(0, 8)[23:]
    assert sorted(first) == sorted(second) == examples and first != second
    assert rows(0, 8) == first + second and rows(1, 4) != first


def test_weights_outside_the_mechanism_are_equal_in_every_row():
    task = make_task(sweeping.cell().parts["task"])
    from bench.backbones.decoder import Decoder

    def parameters(attention, seed):
        model = build(
            lambda spec, factory: Decoder(spec, factory, dim=6, num_layers=2, num_heads=1), task.spec, attention, seed
        )
        return dict(model.named_parameters())

    calm, hungry, other = parameters(Softmax, 3), parameters(Hungry, 3), parameters(Softmax, 4)
    outside = [name for name in calm if ".attention." not in name]
    assert len(outside) >= 10
    assert all(torch.equal(calm[name], hungry[name]) for name in outside)
    assert not torch.equal(calm["embedding.tokens.weight"], other["embedding.tokens.weight"])


# -- faults that the child's own process survives ----------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("nan", "nan", "loss is nan at step 3"),
        ("nan_gradient", "nan", "loss is nan at step 4"),
        ("error", "error", "RuntimeError: first line (broken.py:"),
        ("constructor", "error", "ValueError: cannot be built (broken.py:"),
        ("memory", "oom", "out of memory"),
        ("torch_memory", "oom", "CUDA out of memory. Tried to allocate 20.00 GiB"),
        ("huge", "oom", ""),
    ],
)
def test_a_fault_is_a_record_with_its_status_and_one_line_of_reason(tmp_path, fault, status, reason):
    table, _, events = run(sweeping.cell(f"attention=broken_{fault}", "attention.at=3", "seed=[0,1]"), tmp_path)
    assert [record["status"] for record in table.values()] == [status] * 2
    for record in table.values():
        assert record["reason"].startswith(reason) and "\n" not in record["reason"] and record["reason"]
        assert record.get("scores", []) == []  # a number of a failed run would be a trap
    assert [event for event, _ in events].count("done") == 2


@pytest.mark.fault
def test_a_module_that_cannot_be_imported_is_an_error_with_its_cause(tmp_path):
    table, _, _ = run(sweeping.cell("attention=broken_import"), tmp_path)
    (record,) = table.values()
    assert record["status"] == "error" and "ZeroDivisionError" in record["reason"] and "at import" in record["reason"]
    assert "HYDRA_FULL_ERROR" not in record["reason"]


@pytest.mark.parametrize(
    "text", ["CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA error: out of memory", "can't allocate memory"]
)
def test_all_ways_to_run_out_of_memory_are_oom(text):
    assert cell_module.classify(RuntimeError(f"{text}\nmore")) == ("oom", text)
    assert cell_module.classify(RuntimeError("something else"))[0] == "error"


def test_a_reason_is_never_long():
    assert len(cell_module.classify(ValueError("x" * 10**6))[1]) < 600


def test_a_pattern_that_a_mechanism_does_not_have_is_unsupported_and_one_without_decoding_keeps_its_scores(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Softmax, "patterns", Softmax.patterns.NONCAUSAL_SELF)
        (record,) = run(sweeping.cell(), tmp_path / "a")[0].values()
        assert record["status"] == "unsupported"
        assert record["reason"] == "Softmax is not defined for causal self attention; it has: noncausal self"

    def undecodable(*_):
        raise UnsupportedPattern("Softmax has no decode state")

    monkeypatch.setattr(efficiency, "decoding", undecodable)
    (record,) = run(sweeping.cell(), tmp_path / "b")[0].values()
    assert (
        record["status"] == "ok"
        and record["scores"]
        and record["efficiency"]["no_decoding"] == "Softmax has no decode state"
    )


def test_how_a_causal_mechanism_leaks_stands_in_its_record(cell, reference, tmp_path, monkeypatch):
    assert all(record["leaks"] is None for record in reference[0].values())
    monkeypatch.setattr(Softmax, "leaks", "it ranks all keys")
    (record,) = run(sweeping.cell(), tmp_path)[0].values()
    assert (record["status"], record["leaks"]) == ("ok", "it ranks all keys")


@pytest.mark.parametrize("override", ["task.vocab_size=33", "backbone.positions=rotari", "device=cdua", "device=cuda"])
def test_what_no_run_can_do_is_the_users_mistake_and_no_record(tmp_path, override, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from bench.errors import UserError

    with pytest.raises(UserError):
        run(sweeping.cell(override), tmp_path)
    assert sweeping.records(tmp_path) == {}


def test_a_run_folder_holds_the_config_that_it_ran(cell, reference, tmp_path):
    run(cell, tmp_path, cell.replicas[:1])
    (folder,) = Store(tmp_path).attempts(cell.replicas[0].run_id)
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert config == {**cell.parts, "seed": 0, "learning_rate": 0.01}
