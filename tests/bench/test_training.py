"""The training program: schedule, optimiser, early stop, the exact step of a NaN, and no look at the test split."""

import dataclasses
import math
from typing import Any

import pytest
import sweeping
import torch
from faulty_plugin.broken import Broken
from torch import nn

from attentions.dense.softmax import Softmax
from bench import training
from bench.backbones.base import build
from bench.backbones.decoder import Decoder
from bench.config import Budget
from bench.evaluation import Scores, evaluate
from bench.program import make_step
from tasks.base import IGNORE, Score
from tasks.mqar import MQAR

CPU = torch.device("cpu")
BUDGET = Budget(max_steps=7, batch_size=5, learning_rates=[0.01], eval_every=3, warmup_steps=2)


def task():
    segment = {"length": 12, "num_pairs": 2, "num_examples": 23}
    return MQAR(
        protocol="clean", vocab_size=16, train=[segment], valid=[segment | {"num_examples": 11}], test=[segment]
    )


def model(attention=Softmax, seed=0, **hyper):
    def backbone(spec, factory):
        return Decoder(spec, factory, dim=6, num_layers=1, num_heads=1)

    return build(backbone, task().spec, lambda spec: attention(spec, **hyper), seed)


def train(network=None, mqar=None, peak=0.01, **changes):
    mqar, network = mqar or task(), network or model()
    splits = {split: mqar.segments(split, 0) for split in ("train", "valid")}  # there is no test to look at
    return training.train(network, mqar, splits, dataclasses.replace(BUDGET, **changes), peak, 0, CPU)


class Balanced(Softmax):
    """A number that only the mechanism's own loss pulls, from 3 towards 0."""

    def __init__(self, spec):
        super().__init__(spec)
        self.offset = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, context=None, *, key_mask=None):
        self.add_auxiliary(offset=self.offset.square())
        return super().forward(x, context, key_mask=key_mask)


def test_losses_of_a_mechanism_are_trained_and_recorded_beside_the_tasks_own():
    network, plain = model(Balanced), model()
    result, alone = train(network), train(plain)
    offset = float(dict(network.named_parameters())["layers.0.attention.offset"].detach())
    assert offset < 2.97, "seven steps of AdamW at 0.01 move it by about 0.04"
    (name,) = result.auxiliary
    assert name == "offset" and 9.0 > result.auxiliary[name]["first"] > result.auxiliary[name]["last"] > offset**2
    added = [row["auxiliary_loss"] for row in result.history]
    assert added == pytest.approx([result.auxiliary[name]["first"], added[1], result.auxiliary[name]["last"]])
    assert alone.auxiliary == {} and {row["auxiliary_loss"] for row in alone.history} == {0}
    first, second = (r.history[0]["train_loss"] for r in (result, alone))
    assert first == pytest.approx(second, rel=1e-3)  # the task's loss alone, though clipping differs


def test_losses_are_given_once_and_only_in_train_mode():
    layer = model(Balanced).layers[0].attention
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    layer(x)
    assert set(layer.auxiliary_losses()) == {"offset"} and layer.auxiliary_losses() == {}
    layer(x)
    layer.eval()(x)
    assert layer.auxiliary_losses() == {}


# -- schedule and optimiser --------------------------------------------------------------------------------


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    budget = dataclasses.replace(BUDGET, max_steps=110, warmup_steps=10)
    rates = [training.learning_rate(step, 0.3, budget) for step in range(110)]
    assert rates[:10] == pytest.approx([0.03 * (k + 1) for k in range(10)], rel=1e-12)
    expected = [0.15 * (1 + math.cos(math.pi * k / 100)) for k in range(100)]
    assert rates[10:] == pytest.approx(expected, rel=1e-12)
    assert max(rates) == rates[10] == 0.3 and rates[60] == pytest.approx(0.15) and 0 < rates[-1] < 1e-3 * 0.3


@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1, 0), (1, 1), (3, 5), (5, 5), (2, 0)])
def test_the_schedule_has_a_rate_for_every_step_of_odd_budgets(max_steps, warmup_steps):
    budget = dataclasses.replace(BUDGET, max_steps=max_steps, warmup_steps=warmup_steps)
    rates = [training.learning_rate(step, 1.0, budget) for step in range(max_steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_the_rate_of_the_schedule_is_the_rate_of_the_step(monkeypatch):
    seen: list[float] = []

    def recording(*arguments):
        step = make_step(*arguments)

        def recorded(batch, rate):
            seen.append(rate)
            return step(batch, rate)

        return recorded

    monkeypatch.setattr(training, "make_step", recording)
    result = train()
    assert seen == [training.learning_rate(step, 0.01, BUDGET) for step in range(7)]
    assert [row["learning_rate"] for row in result.history] == [seen[2], seen[5], seen[6]]


def by_hand(weight, gradients, rate, beta1=0.9, beta2=0.999, decay=0.1, eps=1e-8):
    """AdamW, Loshchilov and Hutter 2019, algorithm 2, element by element."""
    m = v = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        weight = weight * (1 - rate * decay)
        weight = weight - rate * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return weight


def test_a_gradient_with_other_strides_than_its_parameter_is_applied_to_its_own_elements():
    """`fused=True` of torch 2.13 on a CPU reads such a gradient in the order of memory."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    gradients = [torch.randn(3, 5, generator=generator).T for _ in range(4)]  # 5 x 3, strides of its transpose
    assert gradients[0].stride() != start.stride()
    layer: Any = nn.Linear(3, 5, bias=False)
    layer.weight.data = start.clone()
    optimiser = training.optimiser(layer, 0.01, BUDGET, CPU)
    for gradient in gradients:
        layer.weight.grad = gradient.clone()  # clone keeps strides
        assert layer.weight.grad.stride() == gradient.stride()
        optimiser.step()
    # float32, four steps: a handful of roundings of values near 1
    torch.testing.assert_close(layer.weight.data, by_hand(start, gradients, 0.01), rtol=1e-6, atol=1e-6)
    assert not optimiser.param_groups[0]["fused"]


def test_all_parameters_are_optimised_with_the_budgets_numbers():
    network = model()
    group = training.optimiser(
        network, 0.02, dataclasses.replace(BUDGET, beta2=0.98, weight_decay=0.3), CPU
    ).param_groups
    assert len(group) == 1 and group[0]["betas"] == (0.9, 0.98) and group[0]["weight_decay"] == 0.3
    assert {id(p) for p in group[0]["params"]} == {id(p) for p in network.parameters()}


def test_the_gradient_is_clipped_to_the_budgets_norm():
    mqar, network = task(), model()
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    batch = mqar.segments("train", 0)[0].rows(slice(0, 5))
    make_step(network, mqar, optimiser, dataclasses.replace(BUDGET, max_grad_norm=1e-3), CPU)(batch, 1.0)
    moved = sum((new - old).square().sum() for new, old in zip(network.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)  # plain descent at rate 1 moves by the norm of the gradient


@pytest.mark.parametrize("size", [1, 2, 4, 5, 99])
def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(size):
    mqar = task()
    batch = mqar.segments("train", 0)[0].rows(slice(0, 5))
    batch.targets[1:3, 0] = IGNORE  # examples with fewer labels than others weigh less
    weights, losses = [], []
    for micro in (None, size):
        network = model().double()
        budget = dataclasses.replace(BUDGET, micro_batch_size=micro)
        optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
        losses.append(make_step(network, mqar, optimiser, budget, CPU)(batch, 1.0)["loss"].double())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_losses_of_mechanisms_are_means_over_micro_batches():
    class Counting(Softmax):
        def attend(self, q, k, v, *, key_mask=None):
            self._auxiliary["rows"] = q.new_tensor(float(len(q)))
            return super().attend(q, k, v, key_mask=key_mask)

    mqar, network = task(), model(Counting)
    batch = mqar.segments("train", 0)[0].rows(slice(0, 5))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.0)
    step = make_step(network, mqar, optimiser, dataclasses.replace(BUDGET, micro_batch_size=2), CPU)
    assert step(batch, 0.0)["rows"].item() == pytest.approx((2 * 2 + 2 * 2 + 1 * 1) / 5)


# -- how training ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_epochs", "steps"), [(None, 7), (1, 5), (2, 7)])
def test_an_epoch_is_once_through_train(max_epochs, steps):
    mqar = task()
    budget = dataclasses.replace(BUDGET, max_epochs=max_epochs)
    limited = training.within_epochs(budget, mqar, mqar.segments("train", 0))
    assert limited.max_steps == steps, "23 examples are five batches of 5"
    assert dataclasses.replace(limited, max_steps=7) == budget


def test_training_counts_steps_examples_and_tokens_and_evaluates_at_every_interval_and_the_end():
    result = train()
    assert (result.status, result.stopped, result.steps) == ("ok", "steps", 7)
    sizes = [5, 5, 5, 5, 3, 5, 5]  # 23 examples in batches of 5, then the next epoch
    assert result.examples == sum(sizes) and result.tokens == 12 * sum(sizes)
    assert [row["step"] for row in result.history] == [3, 6, 7]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 7])
def test_a_nan_is_reported_with_its_exact_step(at):
    result = train(model(Broken, fault="nan", at=at))
    assert (result.status, result.stopped, result.reason) == ("nan", "nan", f"loss is nan at step {at}")


@pytest.mark.parametrize(("at", "reason"), [(2, "loss is nan at step 3"), (7, "validation loss is nan after step 7")])
def test_a_nan_in_the_gradient_is_reported_where_it_first_shows(at, reason):
    result = train(model(Broken, fault="nan_gradient", at=at))
    assert (result.status, result.reason) == ("nan", reason)


def test_divergence_is_reported_with_its_losses():
    result = train(peak=10.0)  # AdamW moves every weight by about the rate in each step
    assert (result.status, result.stopped, result.steps) == ("diverged", "diverged", 3)
    mean_loss = result.history[0]["train_loss"]
    start, first = result.reason.removesuffix(" at the first").rsplit(", ", 1)
    assert start == f"mean loss {mean_loss:.3g} by step 3"
    assert float(first) == pytest.approx(math.log(16), rel=0.05)  # small weights: all 16 classes equally likely
    assert mean_loss > 10 * float(first)


def test_training_stops_when_valid_is_solved_and_no_earlier(monkeypatch):
    values = iter([0.2, 0.5, 0.9])

    def scored(network, mqar, segments, budget):
        entries = {("accuracy", ("all", "")): next(values), ("loss", ("all", "")): 1.0}
        return Scores({key: Score(metric=key[0], value=value, count=1) for key, value in entries.items()})

    monkeypatch.setattr(training, "evaluate", scored)
    result = train(stop_at=0.5)
    assert (result.status, result.stopped, result.steps) == ("ok", "solved", 6)
    assert next(values) == 0.9


def test_a_metric_of_which_lower_is_better_is_never_solved():
    mqar = task()
    mqar.spec = dataclasses.replace(mqar.spec, primary="loss")  # 2.8 nats at first, and an early stop at 3 or less
    assert train(mqar=mqar, stop_at=3.0).stopped == "steps"


def test_training_and_its_stop_never_touch_the_test_split():
    class Secret(MQAR):
        def segments(self, split, seed):
            assert split != "test"
            return super().segments(split, seed)

        def score(self, predictions, segment):
            assert len(segment) == 11  # valid
            return super().score(predictions, segment)

    segment = {"length": 12, "num_pairs": 2, "num_examples": 23}
    mqar = Secret(
        protocol="clean", vocab_size=16, train=[segment], valid=[segment | {"num_examples": 11}], test=[segment]
    )
    assert train(mqar=mqar, stop_at=2.0).steps == 7
    with pytest.raises(AssertionError):
        mqar.segments("test", 0)


# -- evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_scores_do_not_depend_on_the_evaluation_chunk(chunk):
    mqar, network = task(), model()
    segments = mqar.segments("valid", 0)
    budget = dataclasses.replace(BUDGET, eval_batch_size=chunk)
    found = evaluate(network, mqar, segments, budget)
    network.eval()
    with torch.no_grad():
        batch = segments[0].rows(slice(None))
        output = network(batch.inputs, batch.positions)
    correct = (output.argmax(-1) == batch.targets).double().mean(1).mean().item()
    assert found.value("accuracy") == pytest.approx(correct, abs=1e-12)
    # chunks of another size multiply in another order: float32 roundings
    assert found.value("loss") == pytest.approx(mqar.loss(output, batch).item(), rel=1e-5)


def test_evaluation_leaves_the_mode_and_the_weights_alone():
    mqar, network = task(), model()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for mode in (True, False):
        network.train(mode)
        evaluate(network, mqar, mqar.segments("valid", 0), BUDGET)
        assert network.training is mode
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_segments_of_one_slice_are_pooled_by_count():
    segment = {"length": 12, "num_pairs": 2, "num_examples": 5}
    two = [segment, segment | {"length": 20, "num_examples": 17}]
    mqar = MQAR(protocol="clean", vocab_size=16, train=two, valid=two, test=two)
    segments, network = mqar.segments("valid", 0), model()
    both = evaluate(network, mqar, segments, BUDGET)
    parts = [evaluate(network, mqar, [one], BUDGET) for one in segments]
    for metric, counts in (("accuracy", (5, 17)), ("loss", [int((s.targets != IGNORE).sum()) for s in segments])):
        values = [part.value(metric) for part in parts]
        mean = (values[0] * counts[0] + values[1] * counts[1]) / sum(counts)
        assert both.value(metric) == pytest.approx(mean, rel=1e-12)
    rows = both.rows("valid")
    assert len({(r["metric"], r["slice_key"], r["slice_value"]) for r in rows}) == len(rows)


def test_the_tiny_cell_of_the_tests_is_what_it_says():
    cell = sweeping.cell("attention=softmax", "seed=[0,1]")
    assert cell.budget.max_steps == 4 and len(cell.replicas) == 2
