"""The share of AR hits in a gap, on losses whose answer is known and on those of the paper."""

import dataclasses

import pandas as pd
import pytest
import sliced

from bench.report import markdown
from bench.report.leaderboard import boards
from bench.report.recall_gap import COLUMNS, recall_gaps

HITS, OTHERS = 64, 936  # 6.4 % of tokens


def frames(losses):
    """Runs and scores of {attention: [(loss of hits, loss of others), one per seed]}."""
    runs, scores = [], []
    for attention, seeds in losses.items():
        for seed, (hit, other) in enumerate(seeds):
            run_id = f"{attention}{seed}"
            runs.append(dict(run_id=run_id, attention=attention, seed=seed, good=True, chosen=True))
            for value, loss, count in (("hit", hit, HITS), ("other", other, OTHERS)):
                row = dict(run_id=run_id, split="test", metric="loss", value=loss, count=count)
                scores.append(row | dict(slice_key="recall", slice_value=value))
    return pd.DataFrame(runs), pd.DataFrame(scores)


def test_the_share_is_that_of_the_nats_lost_at_hits():
    runs, scores = frames({"softmax": [(1.0, 2.0)], "half": [(1.25, 2.0 + 0.25 * HITS / OTHERS)], "all": [(2.0, 2.0)]})
    table = recall_gaps(runs, scores).set_index("attention")
    assert table.loc["half", "share"] == pytest.approx(0.5) and table.loc["all", "share"] == pytest.approx(1)
    assert table.loc["all", "gap"] == pytest.approx(0.064) and table.loc["all", "hit_tokens"] == pytest.approx(0.064)
    assert pd.isna(table.loc["softmax", "share"]) and table.loc["softmax", "gap"] == 0
    assert list(table.index) == ["softmax", "half", "all"], "the smallest loss first"


def test_table_1_of_zoology_comes_out():
    """Mean losses as printed, two digits of nats: shares of 40 % (long convolution) and 88 % (H3), within rounding."""
    printed = {"softmax": [(0.77, 2.52)], "long_conv": [(3.24, 2.80)], "h3": [(1.91, 2.53)]}
    share = recall_gaps(*frames(printed)).set_index("attention")["share"]
    assert share["long_conv"] == pytest.approx(0.401, abs=0.03)
    assert share["h3"] == pytest.approx(0.884, abs=0.06)


def test_seeds_are_averaged_and_only_chosen_good_runs_count():
    runs, scores = frames({"softmax": [(1.0, 2.0), (1.2, 2.2)], "a": [(2.0, 2.1), (2.2, 2.3), (9.0, 9.0)]})
    runs.loc[runs["run_id"] == "a2", "chosen"] = False
    table = recall_gaps(runs, scores).set_index("attention")
    assert table.loc["a", "hit_loss"] == pytest.approx(2.1) and table.loc["a", "other_loss"] == pytest.approx(2.2)
    assert table.loc["a", "seeds"] == 2
    assert table.loc["a", "share"] == pytest.approx(0.064 / (0.064 + 0.0936))


def test_without_a_gap_a_reference_or_slices_there_is_no_share():
    better = recall_gaps(*frames({"softmax": [(1.0, 2.0)], "better": [(0.9, 1.9)]})).set_index("attention")
    assert pd.isna(better.loc["better", "share"]) and better.loc["better", "gap"] < 0
    alone = recall_gaps(*frames({"linear": [(1.0, 2.0)]}))
    assert alone["gap"].isna().all() and alone["share"].isna().all()
    runs, scores = frames({"softmax": [(1.0, 2.0)]})
    none = recall_gaps(runs, scores.assign(slice_key="length"))
    assert none.empty and list(none.columns) == COLUMNS


def test_without_a_single_hit_there_is_no_table():
    runs, scores = frames({"softmax": [(1.0, 2.0)], "linear": [(2.0, 2.0)]})
    for group in ("hit", "other"):
        assert recall_gaps(runs, scores[scores["slice_value"] == group]).empty


LOSS = {"softmax": (1.0, 2.0), "linear": (2.0, 2.0)}


def page_with(losses, **changes):
    """The page of a language model whose slices of recall have these losses at hits and elsewhere."""
    data = sliced.language()
    recall = [
        dict(run_id=run["run_id"], split="test", metric="loss", value=losses[run["attention"]][part], count=count,
             slice_key="recall", slice_value=value)
        for run in data.runs.to_dict("records")
        if run["attention"] in losses
        for part, (value, count) in enumerate((("hit", HITS), ("other", OTHERS)))
    ]  # fmt: skip
    scores = pd.concat([data.scores, pd.DataFrame(recall)], ignore_index=True).astype(data.scores.dtypes)
    runs = data.runs.assign(**{name: data.runs[name].where(data.runs["attention"] != "linear", value)
                               for name, value in changes.items()})  # fmt: skip
    (board,) = boards(dataclasses.replace(data, runs=runs, scores=scores))
    return markdown.page(board, {})


def test_the_page_of_a_language_model_says_what_of_the_gap_is_recall():
    section = page_with(LOSS).split("## Recall in the gap to softmax")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if "| linear" in line)
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["linear", "2.000", "2.000", "2.000", "0.06400", "1.000"]
    assert "AR hits: 64 tokens, 6.4 %)" in section and "has not learned to recall" not in section
    assert "Recall in the gap" not in markdown.page(boards(sliced.language())[0], {})


def test_who_looks_ahead_is_not_in_the_table():
    section = page_with(LOSS, leaks="reads ahead").split("## Recall in the gap to softmax")[1].split("\n## ")[0]
    assert "| softmax" in section and "| linear" not in section


def test_shares_that_say_nothing_are_named():
    assert "has not learned to recall" in page_with({"softmax": (2.5, 2.0), "linear": (3.0, 2.2)})
