"""The composite index against CAB's published indices, closed forms and simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bench.report import composite
from bench.report.composite import CELL, PATTERNS

HERE = Path(__file__).parent
ROUNDING = 0.03  # of an index: scores are printed to 0.001 or 0.01, and the SDs of causal-self TTS are 0.014 and 0.045
NOT_IN_TABLES = [("causal self", "ABC", "LM"), ("causal self", "ABC", "all")]  # see the test of its perplexity


def read(name):
    return pd.read_csv(HERE / f"cab2022_{name}.csv", comment="#")


def standardised(scores):
    constants = composite.cab2022()
    scores = scores.merge(constants[[*CELL, "higher_is_better"]], on=CELL)
    return composite.standardised(composite.averaged(scores), constants)


def deviations(scores):
    """Our index minus the printed one, by (pattern, attention, task)."""
    z = standardised(scores)
    ours = pd.concat(
        [
            composite.by_task(z).reset_index(),
            composite.by_pattern(z).reset_index().assign(task="all"),
        ]
    ).set_index(["pattern", "attention", "task"])["z"]
    printed = read("indices").set_index(["pattern", "attention", "task"])["index"]
    return (ours.reindex(printed.index) - printed).rename("deviation").sort_index()


def forecasting():
    """CAB's forecasting scores from the per-dataset results: a data set's is the mean over S, M and its parts."""
    table = read("forecasting").groupby(["attention", "group"], sort=False)[["MSE", "MAE"]].mean()
    long = table.stack().rename("value").reset_index()
    long["metric"] = long["group"] + " " + long["level_2"]
    return long.assign(pattern="noncausal cross", task="LSTF")[["pattern", "attention", "task", "metric", "value"]]


# -- CAB --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_formula_gives_the_printed_indices(pattern):
    off = deviations(read("scores")).drop(NOT_IN_TABLES).loc[pattern]
    assert len(off) == {"noncausal self": 53, "causal self": 20, "noncausal cross": 12, "causal cross": 9}[pattern]
    assert off.abs().max() < ROUNDING


def test_the_printed_perplexity_of_abc_is_not_the_one_in_its_index():
    scores = read("scores")
    abc = (scores["attention"] == "ABC") & (scores["metric"] == "PPL") & (scores["pattern"] == "causal self")
    assert scores.loc[abc, "value"].tolist() == [29.13]
    assert deviations(scores)["causal self", "ABC", "LM"] == pytest.approx(1.117 - 0.828, abs=0.001)
    scores.loc[abc, "value"] = 31.53
    assert deviations(scores)[NOT_IN_TABLES].abs().max() < 0.001


def test_per_dataset_scores_give_the_forecasting_indices_to_the_last_digit():
    scores = read("scores")
    exact = pd.concat([scores[scores["task"] != "LSTF"], forecasting()])
    off = deviations(exact)["noncausal cross"]
    assert off.abs().max() < 0.001
    # the table's rounded columns miss ABC's by 0.014 and cosFormer's by 0.023: the SD of the Weather MAE is 0.006
    rounded = deviations(scores)["noncausal cross"]
    assert rounded["ABC", "LSTF"] == pytest.approx(-0.178 + 0.164, abs=0.001)
    assert rounded.abs().idxmax() == ("cosFormer", "LSTF")


def test_the_forecasting_columns_are_means_of_the_per_dataset_scores_and_cab_swaps_two_of_them():
    ours = forecasting().set_index(["attention", "metric"])["value"]
    printed = read("scores").query("task == 'LSTF'").set_index(["attention", "metric"])["value"]
    assert (ours - printed).abs().max() <= 0.0005 + 1e-9  # half of the last printed digit
    swapped = printed.rename(index={"ECL MSE": "Weather MSE", "Weather MSE": "ECL MSE"})
    assert (ours - swapped).abs().max() > 0.4


# the first rows of CAB's leaderboards; what came later was scored against their mean and SD
REFERENCE = {
    "noncausal self": [
        *("local", "cosFormer", "LongShort", "vanilla", "LARA"),
        *("Performer", "Nyström", "ProbSparse", "ABC", "S4D"),
    ],
    "causal self": ["LongShort", "local", "ABC", "vanilla"],
    "noncausal cross": ["vanilla", "ABC", "Performer", "cosFormer"],
    "causal cross": ["vanilla", "ABC", "Performer"],
}


def recomputed(pattern, scores):
    own = scores[scores["pattern"] == pattern]
    table = composite.reference(own, REFERENCE[pattern]).merge(composite.cab2022(), on=CELL, suffixes=("", "_cab"))
    return table.set_index("metric")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_constants_are_the_statistics_of_the_named_mechanisms(pattern):
    scores = pd.concat([read("scores").query("task != 'LSTF'"), forecasting()])
    abc = (scores["attention"] == "ABC") & (scores["value"] == 29.13)
    scores.loc[abc, "value"] = 31.53
    table = recomputed(pattern, scores)
    assert (table["why"] == "").all() and len(table) == {"noncausal self": 10, "causal self": 6}.get(
        pattern, len(table)
    )
    # the scores behind the constants were not rounded: half a printed digit moves a mean or an SD by as much
    unit = np.where(table["mean"] > 20, 0.01, 0.001)
    unit = np.where(table.index.isin(["ROUGE-1", "ROUGE-2", "PPL", "PSNR"]), 0.01, unit)
    off = pd.DataFrame(
        {"mean": (table["mean"] - table["mean_cab"]) / unit, "sd": (table["sd"] - table["sd_cab"]) / unit}
    )
    if pattern == "noncausal self":  # its constant for ROUGE-L needs a sum that is 0.09 larger than the printed one
        assert off.loc["ROUGE-L", "mean"] == pytest.approx(-1.0, abs=0.01)
        off = off.drop("ROUGE-L")
    assert off.abs().max().max() <= 0.5 + 1e-6


def test_the_causal_self_constants_leave_s4d_out_although_it_leads():
    own = read("scores").query("pattern == 'causal self' and task != 'LM'")
    cab = composite.cab2022().set_index(CELL)["mean"]
    without = composite.reference(own, REFERENCE["causal self"]).set_index(CELL)["mean"]
    with_it = composite.reference(own, [*REFERENCE["causal self"], "S4D"]).set_index(CELL)["mean"]
    rouge = ("causal self", "Sum", "ROUGE-1")
    assert without[rouge] == pytest.approx(cab[rouge], abs=1e-4) and with_it[rouge] - cab[rouge] > 0.3
    lead = composite.by_pattern(standardised(own)).sort_values()
    assert lead.index[-1] == ("S4D", "causal self")


def test_the_difference_to_softmax_is_that_of_the_indices():
    z = standardised(read("scores").query("pattern == 'causal cross'"))
    table = composite.summary(composite.ranked(z), baseline="vanilla").set_index("attention")
    printed = read("indices").query("pattern == 'causal cross' and task == 'all'").set_index("attention")["index"]
    assert table["to_baseline"]["ABC"] == pytest.approx(printed["ABC"] - printed["vanilla"], abs=0.003)
    assert table["to_baseline"]["vanilla"] == 0
    assert table["mean_rank"].to_dict() == {"vanilla": 1, "ABC": 2, "Performer": 3}


def test_a_missing_cell_is_left_out_and_counted():
    z = composite.ranked(standardised(read("scores").query("pattern == 'noncausal self'")))
    table = composite.summary(z, baseline="vanilla").set_index("attention")
    assert (table.loc["S4D", "cells"], table.loc["S4D", "cells_all"]) == (7, 10)
    assert table.loc["S4D", "composite"] == pytest.approx((1.035 + 0.457 + 0.176) / 3, abs=0.01)
    assert table.index[-1] == "S4D" and table.index[0] == "local"  # below the complete rows, whatever its index
    # S4D and vanilla on TTS, SR and MLM, the tasks of S4D
    assert table.loc["S4D", "to_baseline"] == pytest.approx(
        table.loc["S4D", "composite"] - (-0.307 - 0.077 + 0.527) / 3, abs=0.01
    )


# -- closed forms -----------------------------------------------------------------------------------


def scores(values, *, higher_is_better=True, metric="accuracy"):
    """{(pattern, task): {attention: values of the seeds}} as rows."""
    return pd.DataFrame(
        [
            [pattern, task, metric, attention, higher_is_better, float(value)]
            for (pattern, task), own in values.items()
            for attention, seeds in own.items()
            for value in seeds
        ],
        columns=[*CELL, "attention", "higher_is_better", "value"],
    )


def indexed(values, names, baseline="softmax", logarithmic=(), **options):
    cells = composite.averaged(scores(values, **options), logarithmic)
    z = composite.ranked(composite.standardised(cells, composite.reference(cells, names)))
    return composite.summary(z, baseline).set_index("attention")


def test_two_mechanisms_stand_at_the_inverse_of_root_two():
    table = indexed({("p", "t"): {"softmax": [0.9], "none": [0.1]}}, ["softmax", "none"])
    assert table["composite"].to_dict() == pytest.approx({"softmax": 2**-0.5, "none": -(2**-0.5)})  # ddof=1
    assert table["to_baseline"]["none"] == pytest.approx(-(2**0.5))


def test_lower_is_better_turns_the_sign_and_the_ranks():
    table = indexed({("p", "t"): {"a": [3.0], "b": [5.0], "c": [7.0]}}, ["a", "b", "c"], higher_is_better=False)
    assert table["composite"].to_dict() == pytest.approx({"a": 1, "b": 0, "c": -1})
    assert table["mean_rank"].to_dict() == {"a": 1, "b": 2, "c": 3}


def test_a_perplexity_may_count_by_its_ratios():
    values = {("p", "t"): {"a": [3.0], "b": [30.0], "c": [300.0]}}
    options = dict(higher_is_better=False, metric="perplexity")
    assert indexed(values, "abc", **options)["composite"]["b"] > 0.4  # 300 squashes the others
    table = indexed(values, "abc", logarithmic=composite.LOGARITHMIC, **options)
    assert table["composite"].to_dict() == pytest.approx({"a": 1, "b": 0, "c": -1})
    with pytest.raises(ValueError, match="positive"):
        indexed({("p", "t"): {"a": [0.0]}}, "a", logarithmic=composite.LOGARITHMIC, **options)


def test_a_pattern_with_two_tasks_weighs_as_much_as_one_with_one():
    one, other = {"a": [1.0], "b": [0.0]}, {"a": [0.0], "b": [1.0]}
    table = indexed({("p", "t"): one, ("p", "u"): one, ("q", "v"): other}, ["a", "b"])
    assert table["composite"].to_dict() == pytest.approx({"a": 0, "b": 0}, abs=1e-12)
    assert table["mean_rank"].to_dict() == {"a": 1.5, "b": 1.5}


def test_who_is_outside_the_reference_set_moves_nobody():
    inside = {"a": [1.0], "b": [0.0]}
    table = indexed({("p", "t"): {**inside, "new": [9.0]}}, ["a", "b"])
    assert table.drop("new")["composite"].equals(indexed({("p", "t"): inside}, ["a", "b"])["composite"])
    assert table["composite"]["new"] == pytest.approx(8.5 / 0.5**0.5)


def test_without_spread_or_with_one_member_there_is_no_z_and_a_reason():
    values = {("p", "t"): {"a": [0.1] * 3, "b": [0.1] * 3, "c": [0.7]}, ("q", "u"): {"a": [1.0], "b": [0.0]}}
    cells = composite.averaged(scores(values))
    found = composite.reference(cells, ["a", "b"]).set_index("pattern")
    assert found["why"].to_dict() == {"p": "all 2 values of the reference set are equal", "q": ""}
    table = indexed(values, ["a", "b"])
    assert table["composite"]["a"] == pytest.approx(2**-0.5) and np.isnan(table["composite"]["c"])
    assert table["mean_rank"]["c"] == 1 and table["cells"].to_dict() == {"a": 2, "b": 2, "c": 1}
    lonely = composite.reference(cells, ["a", "c"]).set_index("pattern")
    assert lonely.loc["q", "why"] == "the reference set has 1 of the 2 values that a spread needs"
    nobody = indexed(values, [])
    assert nobody["composite"].isna().all() and nobody["mean_rank"].notna().all()


def test_equal_values_share_the_mean_of_their_ranks():
    table = indexed({("p", "t"): {"a": [1.0], "b": [1.0], "c": [0.0]}}, "abc")
    assert table["mean_rank"].to_dict() == {"a": 1.5, "b": 1.5, "c": 3}


def test_the_index_does_not_depend_on_the_order_of_rows():
    random = np.random.default_rng(5)
    values = {(p, f"{p}{t}"): {a: random.normal(size=3) for a in "abcd"} for p in "pq" for t in range(2)}
    rows = scores(values)
    one, other = (composite.averaged(frame) for frame in (rows, rows.iloc[::-1]))
    tables = [
        composite.summary(composite.ranked(composite.standardised(c, composite.reference(c, "abcd"))), "a")
        for c in (one, other)
    ]
    pd.testing.assert_frame_equal(*tables)


# -- intervals --------------------------------------------------------------------------------------


def test_the_interval_of_one_cell_is_students():
    seeds = [0.5, 0.7, 0.65]
    table = indexed({("p", "t"): {"a": seeds, "b": [0.0, 0.1]}}, ["a", "b"])
    mean, other = np.mean(seeds), 0.05
    sd = np.std([mean, other], ddof=1)
    low, high = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    centre = (mean + other) / 2
    assert table.loc["a", ["composite_low", "composite_high"]].tolist() == pytest.approx(
        [(low - centre) / sd, (high - centre) / sd]
    )


def test_a_cell_with_one_seed_leaves_no_interval():
    table = indexed({("p", "t"): {"a": [1.0, 2.0], "b": [0.0]}, ("q", "u"): {"a": [1.0, 2.0], "b": [0.0, 1.0]}}, "ab")
    assert table["composite_low"].isna().to_dict() == {"a": False, "b": True}


def test_the_interval_covers_95_percent_over_four_patterns_at_three_seeds():
    # 400 mechanisms measured on one yardstick, true index 0, spreads of 1 to 8; standard error of the share 1.1 %
    random = np.random.default_rng(11)
    rows, constants = [], []
    for i, pattern in enumerate(PATTERNS):
        constants.append([pattern, "t", "accuracy", 0.0, 1.0])
        values = {f"m{n}": random.normal(0, 2.0**i, 3) for n in range(400)}
        rows.append(scores({(pattern, "t"): values}))
    frame = pd.DataFrame(constants, columns=[*CELL, "mean", "sd"])
    found = composite.intervals(composite.standardised(composite.averaged(pd.concat(rows)), frame))
    covered = ((found["composite_low"] <= 0) & (found["composite_high"] >= 0)).mean()
    assert 0.92 < covered < 0.985
