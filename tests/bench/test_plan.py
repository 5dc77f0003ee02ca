"""Identity of runs: what changes a run's id, what must not; what is left to do; when a record is stale."""

import copy
import dataclasses

import pytest

from bench import plan, source
from bench.config import Choice, compose
from bench.errors import UserError
from bench.store import Store

WINDOW = ["attention=sliding_window", "backbone=decoder", "budget=smoke"]
CHANGES = {
    "task": ["task.vocab_size=128", "task.power_a=0.02", "task.train.0.num_examples=3999", "task=mqar_large"],
    "backbone": ["backbone.dim=66", "backbone.num_layers=3", "backbone.positions=none", "backbone=conv_decoder"],
    "attention": ["attention.window=15", "attention.bias=true", "attention=softmax"],
    "budget": [
        "budget.max_steps=21",
        "budget.max_epochs=3",
        "budget.micro_batch_size=3",
        "budget.batch_size=17",
        "budget.warmup_steps=6",
        "budget.eval_every=11",
        "budget.eval_batch_size=255",
        "budget.stop_at=0.5",
        "budget.diverged_at=9",
        "budget.weight_decay=0.2",
        "budget.beta1=0.8",
        "budget.beta2=0.99",
        "budget.max_grad_norm=null",
        "budget.precision=bfloat16",
        "budget.program=compiled",
    ],
    "seed": ["seed=1"],
}
SAME = [
    "device=cpu",
    "jobs=3",
    "results=elsewhere",
    "retry=[error]",
    "search=first_seed",
    "budget.time_limit_seconds=7",
]


def cell(*overrides):
    return plan.cell(compose([*WINDOW, *overrides]))


@pytest.fixture(scope="module")
def base():
    return cell()


@pytest.mark.parametrize("change", [change for changes in CHANGES.values() for change in changes])
def test_every_field_that_a_result_depends_on_changes_the_run(base, change):
    changed = cell(change)
    assert changed.replicas[0].run_id != base.replicas[0].run_id
    assert changed.replicas[0].config_id != base.replicas[0].config_id
    assert (changed.id != base.id) == (change not in CHANGES["seed"])  # seeds are replicas of one cell


@pytest.mark.parametrize("change", SAME)
def test_where_and_how_long_it_may_run_does_not_change_the_run(base, change):
    assert cell(change).replicas == base.replicas and cell(change).id == base.id


def test_every_field_of_the_budget_is_tried():
    fields = {field.name for field in dataclasses.fields(compose(WINDOW).budget)}
    tried = {text.partition("=")[0].removeprefix("budget.") for text in CHANGES["budget"] + SAME}
    assert fields - tried == {"learning_rates"}


def test_a_learning_rate_added_to_the_grid_leaves_the_other_runs(base):
    wider = cell("budget.learning_rates=[0.003,0.01]")
    assert wider.id == base.id and set(base.replicas) < set(wider.replicas) and len(wider.replicas) == 2


def test_a_cell_has_every_learning_rate_for_every_seed_once():
    replicas = cell("budget.learning_rates=[0.003,0.01]", "seed=[2,3,5]").replicas
    assert sorted((r.learning_rate, r.seed) for r in replicas) == [(r, s) for r in (0.003, 0.01) for s in (2, 3, 5)]
    assert len({r.run_id for r in replicas}) == len({r.config_id for r in replicas}) == 6


def test_merging_joins_cells_of_equal_identity_and_no_run_twice():
    merged = plan.merge([cell("seed=[0,1]"), cell("seed=[1,2]"), cell("attention.window=5")])
    assert [[r.seed for r in c.replicas] for c in merged] == [[0, 1, 2], [0]]


def test_the_order_of_keys_in_a_config_does_not_matter():
    choice = compose(WINDOW)
    turned = Choice(
        parts={part: dict(reversed(fields.items())) for part, fields in choice.parts.items()},
        names=choice.names,
        seeds=choice.seeds,
        settings=choice.settings,
    )
    assert plan.cell(turned).replicas == plan.cell(choice).replicas


# -- data of the user's own -------------------------------------------------------------------------------


def of_text(path):
    plan.contents.cache_clear()  # as another command would
    return cell("task=lm_text_byte", f"task.path={path}")


def test_a_run_is_of_the_data_at_the_users_path_wherever_they_lie(tmp_path):
    for name in ("a", "b", "elsewhere/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "text.txt").write_text(name[-1])
    first, second, moved = (of_text(tmp_path / name) for name in ("a", "b", "elsewhere/a"))
    assert first.id == moved.id and first.replicas == moved.replicas and first.names == moved.names
    assert first.id != second.id and not set(first.replicas) & set(second.replicas)
    assert [c.names["task"] for c in (first, second)] == [
        f"lm_text_byte(path={name}-{c.contents[:6]})" for name, c in (("a", first), ("b", second))
    ]
    (tmp_path / "a" / "text.txt").rename(tmp_path / "a" / "other.txt")  # train.txt and test.txt may change places
    renamed = of_text(tmp_path / "a")
    (tmp_path / "a" / "other.txt").write_text("edited")
    assert len({first.id, renamed.id, of_text(tmp_path / "a").id}) == 3


def test_a_result_stays_that_of_the_data_it_was_made_of(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("as it was")
    made = record(of_text(text)) | {"contents": of_text(text).contents}
    text.write_text("as it is")
    assert not plan.is_stale(made) and of_text(text).replicas[0].run_id != made["run_id"]
    text.unlink()
    assert not plan.is_stale(made)
    with pytest.raises(UserError, match=r"task\.path: no such file or folder: .*text\.txt; type task\.path=FOLDER"):
        of_text(text)


# -- records ----------------------------------------------------------------------------------------------


def record(cell, number=0, status="ok"):
    replica = cell.replicas[number]
    return {
        "run_id": replica.run_id,
        "config_id": replica.config_id,
        "learning_rate": replica.learning_rate,
        "seed": replica.seed,
        "status": status,
        "config": cell.parts,
        "plugins": [],
    }


def test_only_what_has_no_final_record_is_left_to_do(tmp_path):
    store, planned = Store(tmp_path), cell("seed=[0,1,2,3,4,5,6,7,8]")
    statuses = ["ok", "nan", "diverged", "unsupported", "error", "oom", "timeout", "killed", "interrupted"]
    for number, status in enumerate(statuses):
        store.write(record(planned, number, status), {})

    def left(*retry):
        return [statuses[r.seed] for r in plan.outstanding(planned, store, retry)[1]]

    assert left() == ["killed", "interrupted"]
    assert left("error", "oom") == ["error", "oom", "killed", "interrupted"]
    store.write(record(planned, 7, "ok"), {})
    assert left() == ["interrupted"]  # the newest attempt counts
    assert [len(part) for part in plan.outstanding(planned, Store(tmp_path / "new"))] == [9, 9]


def test_the_first_seed_finds_the_rate_of_the_others(tmp_path):
    store = Store(tmp_path)
    planned = cell("seed=[3,1,2]", "budget.learning_rates=[0.003,0.01,0.03]", "search=first_seed")
    assert planned.planned == 5 and {run.seed for run in planned.scouts} == {3}

    def told():
        needed, left = plan.outstanding(planned, store)
        return [[(run.learning_rate, run.seed) for run in part] for part in (needed, left)]

    scouts = [(0.003, 3), (0.01, 3), (0.03, 3)]
    assert told() == [scouts, scouts]
    for number, valid in ((0, 0.2), (3, 0.6)):
        store.write({**record(planned, number), "valid": valid, "task": {"higher_is_better": True}}, {})
    assert told() == [scouts, scouts[2:]]
    store.write({**record(planned, 6, "nan"), "task": {"higher_is_better": True}}, {})
    assert told() == [[*scouts, (0.01, 1), (0.01, 2)], [(0.01, 1), (0.01, 2)]]
    for number, valid in ((0, 0.2), (3, 0.6)):  # of a loss the smaller one is better
        store.write({**record(planned, number), "valid": valid, "task": {"higher_is_better": False}}, {})
    assert told()[1] == [(0.003, 1), (0.003, 2)]
    for number in (0, 3):
        store.write({**record(planned, number, "diverged"), "task": {"higher_is_better": True}}, {})
    assert told() == [scouts, []]  # no rate works: the other seeds would only fail again


@pytest.fixture
def edited(monkeypatch):
    """A function that makes the source of a module of ours look changed."""
    original = source._code

    def edit(name):
        monkeypatch.setattr(source, "_code", lambda path: original(path) + ("#" if path.stem == name else ""))
        source.source_hash.cache_clear()

    yield edit
    source.source_hash.cache_clear()


@pytest.mark.parametrize(
    ("module", "stale"),
    [("sliding_window", True), ("softmax", True), ("base", True), ("short_conv", False), ("decoder", False)],
)
def test_a_record_is_stale_when_the_source_of_its_mechanism_or_family_changed(base, edited, module, stale):
    assert not plan.is_stale(record(base))
    edited(module)
    assert plan.is_stale(record(base)) is stale
    changed = cell()
    assert (changed.replicas[0].run_id != base.replicas[0].run_id) is stale
    assert changed.replicas[0].config_id == base.replicas[0].config_id  # by which the stale row is found


def test_a_mechanism_that_the_backbone_brings_counts_as_source(edited):
    mixed = cell("backbone=conv_decoder")
    edited("short_conv")
    assert plan.is_stale(record(mixed))


def test_a_record_is_stale_when_the_task_or_the_program_has_another_version(base, monkeypatch):
    literal = source.literal
    with monkeypatch.context() as patch:
        patch.setattr(source, "literal", lambda target, name, default=None: 99 if name == "version" else default)
        assert plan.is_stale(record(base))
    assert source.literal is literal and not plan.is_stale(record(base))
    monkeypatch.setattr(plan, "training_version", lambda: 99)
    assert plan.is_stale(record(base))


def test_planning_changes_nothing_in_the_configuration():
    choice = compose(WINDOW)
    before = copy.deepcopy(choice.parts)
    plan.cell(choice)
    assert choice.parts == before
