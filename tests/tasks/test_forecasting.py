"""Forecasting: reading, the clock, splits, windows, scores and floors, on small files and on the packaged series."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tasks import _series, _series_floors, sources
from tasks.forecasting import Forecasting
from tests.tasks.packaged import fetched

CONF = Path(__file__).parents[2] / "conf" / "task"
T, V = 500, 3  # rows and variables of the file


def write(path, *, values=None, times=None, header="date,HUFL,LULL,OT"):
    """A file in the format of ETDataset's ETTh1.csv."""
    if times is None:
        start = datetime.datetime(2016, 7, 1)
        times = [str(start + datetime.timedelta(hours=hour)) for hour in range(T)]
    values = noise() if values is None else values
    rows = [",".join([str(time), *map(repr, row.tolist())]) for time, row in zip(times, values, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def noise():
    return np.random.default_rng(0).normal(3, 2, (T, V))


def task(path, **settings):
    return Forecasting(
        **dict(data="mine", path=path, context_length=17, label_length=5, horizon=7, split=[300, 100, 80]) | settings
    )


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "ETTh1.csv")


# -- the protocol ---------------------------------------------------------------------------------


def test_windows_are_those_of_the_published_borders(file):
    """As published: train starts at row 0, valid and test start one window before their border; stride one."""
    built = task(file, marks=[])
    train = noise()[:300]
    scaled = (noise() - train.mean(0)) / train.std(0)
    for split, first, end in (("train", 0, 300), ("valid", 300 - 17, 400), ("test", 400 - 17, 480)):
        (segment,) = built.segments(split, 0)
        assert len(segment) == end - first - 17 - 7 + 1
        for index in (0, 3, len(segment) - 1):
            at = first + index
            for got, want in (
                (segment.context[index], scaled[at : at + 17]),
                (segment.inputs[index, :5], scaled[at + 12 : at + 17]),
                (segment.targets[index], scaled[at + 17 : at + 24]),
            ):
                torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32))
        assert segment.positions.tolist()[-1] == list(range(5, 12)) and built.spec.length == 12
        assert end == at + 24


def test_targets_of_the_splits_do_not_overlap_and_nothing_of_the_horizon_is_in_the_inputs(file, tmp_path):
    built = task(file)
    ranges = {
        split: {row for first in built.starts(split) for row in range(first + 17, first + 24)}
        for split in ("train", "valid", "test")
    }
    assert ranges["train"] == set(range(17, 300)) and ranges["test"] == set(range(400, 480))
    assert not ranges["train"] & ranges["valid"] and not ranges["valid"] & ranges["test"]
    later = noise()
    later[400:] += 9  # other values of test: its first window knows none of them, and train and valid stay as they are
    other = task(write(tmp_path / "other.csv", values=later))
    for split in ("train", "valid"):
        assert built.segments(split, 0)[0].sha256() == other.segments(split, 0)[0].sha256()
    for form in ("cross", "sequence"):
        one, two = (task(p, form=form).segments("test", 0)[0] for p in (file, str(tmp_path / "other.csv")))
        assert torch.equal(one.inputs[0], two.inputs[0]) and not torch.equal(one.inputs[1], two.inputs[1])
        assert not torch.equal(one.targets[0], two.targets[0])
        assert (one.inputs[:, -7:, :V] == 0).all()


def test_the_two_forms_show_the_same_numbers(file):
    cross, line = (task(file, form=form).segments("valid", 0)[0] for form in ("cross", "sequence"))
    assert torch.equal(line.inputs[:, :17], cross.context) and torch.equal(line.targets, cross.targets)
    assert torch.equal(line.inputs[:, 12:], cross.inputs)
    assert line.context is None and torch.equal(line.positions[0].long(), torch.arange(17, 24))


@pytest.mark.parametrize(("features", "inputs", "targets"), [("M", 3, 3), ("S", 1, 1), ("MS", 3, 1)])
def test_features_choose_what_is_seen_and_what_is_predicted(file, features, inputs, targets):
    built = task(file, features=features, target="LULL", marks=["hour"])
    (segment,) = built.segments("test", 0)
    assert segment.context.shape[2] == inputs + 1 and segment.targets.shape[2] == targets
    assert built.spec.inputs.num_marks == 1 and built.spec.output.num_values == targets
    (whole,) = task(file).segments("test", 0)
    assert torch.equal(segment.targets[..., built.traced], whole.targets[..., 1])


def test_marks_are_informers_time_features():
    times = np.array(["2016-07-01T00:15:00", "2016-12-31T23:59:00", "1969-01-05T12:00:00"], "M8[s]")
    got = _series.marks(times, list(_series.MARKS))
    for row, time in zip(got, times.tolist(), strict=True):
        want = [time.minute / 59, time.hour / 23, time.weekday() / 6, (time.day - 1) / 30]
        want.append((time.timetuple().tm_yday - 1) / 365)
        np.testing.assert_allclose(row, np.array(want) - 0.5)


def test_windows_are_views_and_batches_are_not(file):
    (segment,) = task(file).segments("train", 0)
    assert segment.context.untyped_storage().nbytes() == 4 * T * (V + 4)
    batch = next(task(file).batches([segment], 11, torch.Generator().manual_seed(0)))
    assert batch.context.shape == (11, 17, V + 4) and batch.context.untyped_storage().nbytes() == 4 * 11 * 17 * (V + 4)


def test_shares_are_cut_as_in_the_published_code():
    assert _series.borders(26304, [0.7, 0.1, 0.2]) == {
        "train": (0, 18412), "valid": (18412, 21044), "test": (21044, 26304)  # int(.7 n), the rest, int(.2 n)
    }  # fmt: skip
    assert _series.borders(17420, [8640, 2880, 2880])["test"] == (11520, 14400)


# -- the clock ------------------------------------------------------------------------------------


def test_a_clock_rounds_times_keeps_the_first_of_two_and_leaves_gaps_open():
    minutes = np.array([0, 5, 9, 11, 15, 30, 34])  # 9 and 11 are both due at 10; 20 and 25 are missing
    times = np.datetime64("2010-03-24T09:51:00", "s") + 60 * minutes
    series = _series.Series(times=times, values=minutes[:, None].astype(float), names=("g",))
    got = _series.on_clock(series, 5)
    np.testing.assert_array_equal(got.values[:, 0], [0, 5, 9, 15, np.nan, np.nan, 30, 34])
    assert (np.diff(got.times) == np.timedelta64(300, "s")).all()
    assert _series.starts(got.values, (0, 8), 1, 1, 1).tolist() == [0, 1, 2, 6]
    assert _series.on_clock(series, None) is series


def test_no_window_crosses_a_gap(tmp_path):
    start = datetime.datetime(2016, 7, 1)
    hours = [hour + 2 * (hour >= 200) for hour in range(T)]
    path = write(tmp_path / "gap.csv", times=[str(start + datetime.timedelta(hours=hour)) for hour in hours])
    built = task(path, step_minutes=60)
    first = built.starts("train")
    assert first.tolist() == [*range(200 - 24 + 1), *range(202, 300 - 24 + 1)]
    assert not any(torch.isnan(part).any() for part in (built.segments("train", 0)[0].context,))


# -- files ----------------------------------------------------------------------------------------


def test_a_folder_a_file_gzip_and_the_hub_give_the_same(tmp_path, monkeypatch, file):
    want = task(file).segments("test", 0)[0].sha256()
    packed = tmp_path / "packed.csv"
    packed.write_bytes(gzip.compress((tmp_path / "ETTh1.csv").read_bytes()))
    for data, path in (("etth1", str(tmp_path)), ("mine", str(packed))):
        assert task(path, data=data).segments("test", 0)[0].sha256() == want
    import datasets

    monkeypatch.setenv("ATTENTION_BENCHMARK_DATA", str(tmp_path / "cache"))
    with pytest.raises(sources.MissingData, match=r"type python -m bench.data fetch etth1 .* or task.path="):
        task(None, data="etth1")
    home = tmp_path / "cache" / "hub" / "etth1-main"
    home.mkdir(parents=True)
    fetched = datasets.load_dataset("csv", data_files=file, split="train", cache_dir=str(tmp_path / "made"))
    fetched.to_parquet(str(home / "train.parquet"))
    assert task(None, data="etth1").segments("test", 0)[0].sha256() == want


def test_missing_cells_are_gaps_and_other_words_are_mistakes(tmp_path):
    rows = ["date,a", *(f"2016/07/01 {hour:02d}:00,{'nil' if hour == 3 else hour}" for hour in range(24))]
    series = _series.parse("\n".join(rows).encode(), "date", "x.csv")
    assert np.flatnonzero(np.isnan(series.values[:, 0])).tolist() == [3]
    with pytest.raises(ValueError, match=r"x\.csv cannot be read: could not convert string 'abc'"):
        _series.parse("\n".join(rows).replace("nil", "abc").encode(), "date", "x.csv")
    with pytest.raises(ValueError, match="times must be like 2016-07-01 00:00:00"):
        _series.parse(b"date,a\nyesterday,1\n", "date", "x.csv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(features="U"), 'unknown task.features "U"; nearest: '),
        (dict(form="crss"), 'unknown task.form "crss"; nearest: cross'),
        (dict(horizon=0), "task.horizon must be at least 1, got 0; nearest: 1"),
        (dict(step_minutes=0), "task.step_minutes must be at least 1, got 0; nearest: 1"),
        (dict(label_length=18), "task.label_length must lie in 0 .. 17, got 18; nearest: 17"),
        (dict(target="OTT"), 'unknown task.target "OTT"; nearest: OT'),
        (dict(date="time"), 'unknown column of the date in ETTh1.csv "time"; nearest: date'),
        (dict(marks=["hours"]), 'unknown mark "hours"; nearest: hour'),
        (dict(split=[300, 100, 200]), "split asks for 600 rows and there are 500; type task.split=[0.6,0.2,0.2]"),
        (dict(split=[0.6, 0.2, 0.1]), "must be rows or shares that sum to 1"),
        (
            dict(path=None),
            "read from a CSV file of yours, with a column date and one for each variable; type task.path",
        ),
        (dict(path="/nowhere.csv"), "no such file or folder: /nowhere.csv; type task.path=FILE.csv"),
    ],
)
def test_mistakes_are_one_line(file, settings, message):
    with pytest.raises(ValueError) as caught:
        task(**dict(path=file) | settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_split_without_a_window_says_so(file):
    with pytest.raises(ValueError, match="test has 5 rows and no complete window of 17 "):
        task(file, split=[300, 100, 5]).segments("test", 0)
    with pytest.raises(ValueError, match='unknown split "dev"; there are: train, valid, test'):
        task(file).segments("dev", 0)


# -- scores and floors ----------------------------------------------------------------------------


def test_errors_are_counted_by_step_and_variable(file):
    built = task(file)
    (segment,) = built.segments("test", 0)
    predictions = segment.targets.clone()
    predictions[:, 2, 1] += 2.0  # third step, second variable
    scores = {(score.metric, score.slice): score for score in built.score(predictions, segment)}
    assert scores["mse", ("all", "")].value == pytest.approx(4 / (7 * V), rel=1e-5)
    assert scores["mae", ("all", "")].value == pytest.approx(2 / (7 * V), rel=1e-5)
    assert scores["mse", ("horizon", "3")].value == pytest.approx(4 / V, rel=1e-5)
    assert scores["mse", ("horizon", "2")].value == 0
    assert scores["mse", ("variable", "LULL")].value == pytest.approx(4 / 7, rel=1e-5)
    assert scores["mse", ("variable", "LULL")].count * V == scores["mse", ("all", "")].count == len(segment) * 7 * V
    window = len(segment) // 4
    trace = [scores["forecast", ("trace0", str(step))].value for step in range(1, 8)]
    assert trace == predictions[window, :, 2].tolist()
    assert scores["target", ("trace1", "1")].value == float(segment.targets[3 * len(segment) // 4, 0, 2])
    past = [scores["target", ("trace1_past", str(step))].value for step in range(1 - built.context_length, 1)]
    ahead = built.starts("test")[3 * len(segment) // 4] + built.context_length
    assert past == built.table[ahead - built.context_length : ahead, 2].tolist(), "it ends where the target begins"
    assert scores["minutes", ("trace0", "1")].value == 60
    assert built.loss(predictions, segment).item() == pytest.approx(4 / (7 * V), rel=1e-5)
    with pytest.raises(ValueError, match="predictions must be"):
        built.score(predictions[:, :3], segment)


@pytest.mark.parametrize("form", ["cross", "sequence"])
def test_at_most_48_steps_before_a_forecast_are_recorded(file, form):
    built = task(file, context_length=53, form=form)
    (segment,) = built.segments("test", 0)
    past = {int(s.slice[1]): s.value for s in built.score(segment.targets, segment) if s.slice[0] == "trace0_past"}
    ahead = built.starts("test")[len(segment) // 4] + 53
    assert list(past) == list(range(-47, 1)) and past[0] == float(built.table[ahead - 1, 2])


def test_the_floor_of_the_day_before_is_exact_on_a_daily_rhythm(tmp_path):
    hours = np.arange(T)
    daily = np.stack([hours % 24, (hours % 24) ** 2, -(hours % 24)], 1).astype(float)
    built = task(write(tmp_path / "daily.csv", values=daily), context_length=31, horizon=29)
    floors = built.solvers({split: built.segments(split, 0) for split in ("train", "valid", "test")})
    assert floors["day before"] < 1e-12 and floors["week before"] < 1e-12
    assert built.references == {"week before"}  # 31 hours are a day and less than a week: the network cannot see it
    assert task(tmp_path / "daily.csv", context_length=23).references == {"day before", "week before"}
    assert floors["last value"] > 0.1 and floors["ridge regression"] < 0.01
    (test,) = built.segments("test", 0)
    assert floors["mean of train"] == pytest.approx(test.targets.double().square().mean().item())


def test_a_season_skips_what_is_missing():
    values = np.array([[0.0], [1], [2], [np.nan], [4], [5], [6], [7]])
    got = _series_floors.seasonal(values, np.array([6, 4]), 3, 3)[..., 0]
    assert got.tolist() == [[0, 4, 5], [1, 2, 0]]  # rows 6, 7, 8 as 3 -> 0, 4, 5; rows 4, 5, 6 as 1, 2, 3 -> 0


def test_ridge_regression_recovers_a_linear_law():
    generator = torch.Generator().manual_seed(0)
    law = torch.randn(11, 5, generator=generator)
    pasts = {split: torch.randn(800, 11, 3, generator=generator) for split in ("train", "valid", "test")}
    targets = {split: torch.einsum("nlv,lp->npv", past, law) for split, past in pasts.items()}
    assert _series_floors.ridge(pasts, targets) < 1e-4
    noisy = {split: target + torch.randn(target.shape, generator=generator) for split, target in targets.items()}
    assert 0.9 < _series_floors.ridge(pasts, noisy) < 1.1


# -- the packaged series --------------------------------------------------------------------------

PACKAGED = {
    "elec_vic": (dict(data="elec_vic", step_minutes=60), (2041, 697, 697), "b34258380a2dd141"),
    "temps_2city": (dict(data="temps_2city", step_minutes=60), (5017, 1729, 1729), "3298bd7fd0160013"),
    "cgm": (dict(data="cgm", step_minutes=5), (20828, 6000, 7477), "6ad39f4885257f65"),
}


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_series_are_pinned(name):
    settings, sizes, pin = PACKAGED[name]
    fetched(name)
    built = Forecasting(**settings)
    segments = [built.segments(split, 0)[0] for split in ("train", "valid", "test")]
    assert tuple(map(len, segments)) == sizes
    digest = hashlib.sha256("".join(segment.sha256()["labels"] for segment in segments).encode()).hexdigest()
    assert digest.startswith(pin), "other data or another cut: bump Forecasting.version"
    assert not built.seeded and segments[2].sha256() == Forecasting(**settings).segments("test", 7)[0].sha256()


ROWS = [path for path in CONF.glob("*.yaml") if "forecasting.Forecasting" in path.read_text()]


@pytest.mark.parametrize("row", ROWS, ids=lambda path: path.stem)
def test_rows_write_out_every_setting_and_those_of_archives_build(row):
    lines = row.read_text().splitlines()
    keys = [line.split(":")[0] for line in lines[2:]]
    assert keys == list(inspect.signature(Forecasting.__init__).parameters)[1:]
    assert lines[0].startswith("# ") and lines[0].endswith(".") and lines[2:].count("path: null") == 1
    settings = OmegaConf.to_container(OmegaConf.load(row))
    del settings["_target_"]
    if settings["data"] in _series.PACKAGED and sources.is_here(settings["data"]):
        assert Forecasting(**settings).spec.primary == "mse"
    else:
        with pytest.raises(sources.MissingData, match="type "):
            Forecasting(**settings | dict(path="/nowhere"))
