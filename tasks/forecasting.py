"""Forecasting: the next values of a series from a window of its past."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks import _series
from tasks._batches import in_order, shuffled
from tasks._series_floors import ridge, seasonal
from tasks.base import SPLITS, Batch, Metric, Score, Task, TaskSpec, Values, Vectors

FEATURES = "M", "S", "MS"
FORMS = "cross", "sequence"
SEASONS = {"day before": 1, "week before": 7}  # naive forecasts, in days; a reference where the window is shorter
LOOK_BACK = 48  # steps of the context that are recorded before a traced forecast


class Forecasting(Task):
    """The `horizon` values after a window of `context_length`, all at once: Informer's task and its protocol.

    Variables are standardised by the rows of train. A row of the data is a position: its values and its calendar marks,
    which are known of the future too. With context_length = 4, label_length = 2, horizon = 3, values v, marks m:

        cross      context  v1m1 v2m2 v3m3 v4m4    inputs  v3m3 v4m4 0m5 0m6 0m7    targets  . . v5 v6 v7
        sequence   inputs   v1m1 v2m2 v3m3 v4m4 0m5 0m6 0m7                         targets  . . . . v5 v6 v7

    `cross` is Informer's: an encoder reads the window, and a decoder's tokens, the last `label_length` rows and a blank
    for each step ahead, read the encoder: noncausal cross-attention on real data. `sequence` is the same in one stream,
    for encoders and decoders. No input holds a value of the horizon, so neither form has a future to hide.

    Windows start at every row in train and every `eval_stride` rows in valid and test; there the first ones reach back
    over the border for their context, never for their targets. On a regular clock (`step_minutes`) windows with a
    missing reading are left out and nothing is filled in.

    Args:
        data: elec_vic, temps_2city or cgm, which are packaged; etth1 or etth2 of the hub; or any name, with `path`.
        path: a CSV file of yours with a column of times and one for each variable, or its folder; None: the fetched.
        date: the column of times in a CSV file.
        features: M (all variables predict all), S (the target predicts itself), MS (all predict the target).
        target: the variable of S and MS, and of the traces; None: the last.
        context_length, label_length, horizon: rows; label_length is of the form `cross`.
        split: rows of train, valid and test, or their shares, in time order.
        marks: of minute, hour, weekday, day (of the month), yearday.
        step_minutes: of the regular clock; None: rows follow each other as they are.
        eval_stride: rows between two windows of valid or test.
        form: cross or sequence.

    Raises:
        ValueError: at construction, an impossible setting, with the nearest valid one; MissingData: no data.

    Source: Zhou et al. 2020 (Informer), https://arxiv.org/abs/2012.07436, section 5 and its code
    (data/data_loader.py, utils/timefeatures.py); as a noncausal-cross task: CAB (Zhang et al. 2022,
    https://arxiv.org/abs/2210.07661). Differs: the published code drops the last batch of test that is not full.
    """

    version = 1
    name = "forecasting"
    seeded = False

    def __init__(
        self,
        *,
        data: str,
        path: str | None = None,
        date: str = "date",
        features: str = "M",
        target: str | None = None,
        context_length: int = 96,
        label_length: int = 48,
        horizon: int = 24,
        split: Sequence[float] = (0.6, 0.2, 0.2),
        marks: Sequence[str] = ("hour", "weekday", "day", "yearday"),
        step_minutes: int | None = None,
        eval_stride: int = 1,
        form: str = "cross",
    ):
        for name, word, valid in (("features", features, FEATURES), ("form", form, FORMS)):
            if word not in valid:
                near = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.0)[0]
                raise ValueError(f'unknown task.{name} "{word}"; nearest: {near}. All of them: {", ".join(valid)}')
        for key, number in dict(
            context_length=context_length, horizon=horizon, eval_stride=eval_stride, step_minutes=step_minutes
        ).items():
            if number is not None and number < 1:
                raise ValueError(f"task.{key} must be at least 1, got {number}; nearest: 1")
        if not 0 <= label_length <= context_length:
            nearest = min(max(0, label_length), context_length)
            raise ValueError(
                f"task.label_length must lie in 0 .. {context_length}, got {label_length}; nearest: {nearest}"
            )
        self.context_length, self.horizon, self.eval_stride = context_length, horizon, eval_stride
        self.seen = label_length if form == "cross" else context_length  # rows of the inputs that hold values
        self.form = form
        self.protocol = f"{data}_{features.lower()}_{context_length}_{horizon}{'_sequence' * (form == 'sequence')}"

        series = _series.on_clock(_series.read(data, path, date), step_minutes)
        names = [series.names[-1]] if target is None else [target]
        own, every = _series.chosen(series, names), list(range(len(series.names)))
        wanted, used = every if features == "M" else own, own if features == "S" else every
        self.variables = [series.names[column] for column in wanted]
        self.targets = [used.index(column) for column in wanted]  # columns of the values, and of the context
        self.traced = self.variables.index(names[0])
        self.borders = _series.borders(len(series.values), split)
        train = series.values[slice(*self.borders["train"]), used]
        scale = np.nanstd(train, 0)
        self.values = (series.values[:, used] - np.nanmean(train, 0)) / np.where(scale > 0, scale, 1)
        self.minutes = float(np.median(np.diff(series.times[:1000]).astype(np.int64))) / 60
        window = self.minutes * context_length
        self.references = frozenset(name for name, days in SEASONS.items() if days * 1440 > window)
        told = _series.marks(series.times, marks)
        self.table = torch.from_numpy(np.concatenate([self.values, told], 1).astype(np.float32))
        inputs = Vectors(dim=self.table.shape[1], num_marks=told.shape[1])
        self.spec = TaskSpec(
            inputs=inputs,
            output=Values(num_values=len(wanted)),
            length=self.seen + horizon,
            causal=False,
            context=inputs if form == "cross" else None,
            context_length=context_length if form == "cross" else None,
            metrics={
                "mse": Metric(unit="of the variance in train", higher_is_better=False),
                "mae": Metric(unit="standard deviations of train", higher_is_better=False),
                "loss": Metric(unit="of the variance in train", higher_is_better=False),
            },
            primary="mse",
            chance=1.0,  # about: what the mean of train gives, if test varies as train does
        )

    def starts(self, split: str) -> np.ndarray:
        """First row of each window of a split.

        Raises:
            ValueError: an unknown split, or one too short for a single window.
        """
        if split not in SPLITS:
            raise ValueError(f'unknown split "{split}"; there are: {", ".join(SPLITS)}')
        stride = 1 if split == "train" else self.eval_stride
        found = _series.starts(self.values, self.borders[split], self.context_length, self.horizon, stride)
        if not len(found):
            first, end = self.borders[split]
            raise ValueError(
                f"{split} has {end - first} rows and no complete window of {self.context_length} + {self.horizon}; "
                "type a smaller task.context_length or task.horizon"
            )
        return found

    def segments(self, split: str, seed: int) -> list[Batch]:
        first = self.starts(split)
        ahead = first + self.context_length
        inputs = _series.windows(self.table, ahead - self.seen, self.spec.length).clone()
        inputs[:, self.seen :, : self.values.shape[1]] = 0.0
        places = torch.arange(self.seen, self.spec.length, dtype=torch.int16)
        return [
            Batch(
                inputs=inputs,
                positions=places.expand(len(first), -1),
                targets=_series.windows(self.table[:, self.targets], ahead, self.horizon),
                context=_series.windows(self.table, first, self.context_length) if self.form == "cross" else None,
            )
        ]

    def batches(self, segments: Sequence[Batch], batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        if generator is None:
            yield from in_order(segments, batch_size)
        else:
            yield from shuffled(segments, batch_size, generator)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(output.float(), batch.targets.float())

    def predict(self, output: Tensor, batch: Batch) -> Tensor:
        return output.float()

    def score(self, predictions: Tensor, segment: Batch) -> list[Score]:
        """Errors of predictions [N, P, V]: over all, by step ahead and by variable; two forecasts as they are.

        `forecast` and `target` of the slices trace0 and trace1 are one variable of the windows at 1/4 and 3/4 of the
        segment, by step ahead; those of trace0_past and trace1_past are the end of the context, whose last step is 0.
        `minutes` at step 1 is the time that a step takes.
        """
        if predictions.shape != segment.targets.shape:
            raise ValueError(f"predictions must be {list(segment.targets.shape)}, got {list(predictions.shape)}")
        error = (predictions - segment.targets).double()
        square = error.square()
        count = error.numel()
        steps, variables = square.mean((0, 2)).tolist(), square.mean((0, 1)).tolist()
        scores = [
            Score(metric="mse", value=square.mean().item(), count=count),
            Score(metric="mae", value=error.abs().mean().item(), count=count),
        ]
        for step, value in enumerate(steps, start=1):
            scores.append(Score(metric="mse", value=value, count=count // len(steps), slice=("horizon", str(step))))
        for name, value in zip(self.variables, variables, strict=True):
            scores.append(Score(metric="mse", value=value, count=count // len(variables), slice=("variable", name)))
        for number, window in enumerate((len(segment) // 4, 3 * len(segment) // 4)):
            past = self._past(segment.rows(slice(window, window + 1)))[0, -LOOK_BACK:, self.traced].tolist()
            lines = [
                ("forecast", "", 1, predictions[window, :, self.traced].tolist()),
                ("target", "", 1, segment.targets[window, :, self.traced].tolist()),
                ("target", "_past", 1 - len(past), past),
                ("minutes", "", 1, [self.minutes]),
            ]
            for metric, part, first, values in lines:
                for step, value in enumerate(values, start=first):
                    slice_ = f"trace{number}{part}", str(step)
                    scores.append(Score(metric=metric, value=value, count=1, slice=slice_))
        return scores

    def solvers(self, splits: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """MSE on test of the mean of train, the last value, the value a day or a week before, and a ridge regression.

        The regression takes the window of a variable to its horizon, with one matrix for all variables.
        """

        def mse(predicted: Tensor | float) -> float:
            return float((splits["test"][0].targets.double() - predicted).square().mean())

        pasts = {split: self._past(splits[split][0]) for split in SPLITS}
        floors = {"mean of train": mse(0.0), "last value": mse(pasts["test"][:, -1:].double())}
        ahead = self.starts("test") + self.context_length
        for name, days in SEASONS.items():
            period = days * 1440 / self.minutes
            if period == round(period) and period <= self.borders["train"][1]:
                values = self.values[:, self.targets]
                floors[name] = mse(torch.from_numpy(seasonal(values, ahead, self.horizon, round(period))))
        floors["ridge regression"] = ridge(pasts, {split: splits[split][0].targets for split in SPLITS})
        return floors

    def _past(self, batch: Batch) -> Tensor:
        """Known values of the variables to be predicted, [N, context_length, V]."""
        rows = batch.inputs if batch.context is None else batch.context
        return rows[:, : self.context_length, self.targets]
