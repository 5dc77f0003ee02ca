"""MAD's score on runs whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bench.report import mad_page
from bench.report.frames import Frames
from bench.report.leaderboard import boards
from bench.report.mad_score import mad_runs, mad_scores
from tests.bench.report.sliced import joined
from tests.bench.report.synthetic import frames
from tests.bench.report.synthetic import run as synthetic_run


def run(attention, setting, seed, test, **changes):
    skill, _, rest = setting.partition("/")
    known = dict(protocol=rest.partition(",")[0], backbone="b", budget="small", leaks=None, chosen=True, good=True)
    return {**known, "attention": attention, "skill": skill, "setting": setting, "seed": seed, "test": test, **changes}


def test_skills_count_alike_whatever_the_number_of_their_settings():
    runs = pd.DataFrame(
        [
            *(run("a", "mad_recall/clean", seed, 0.8) for seed in (0, 1)),
            *(run("a", "mad_recall/clean,length=9", seed, 0.4) for seed in (0, 1)),
            *(run("a", "mad_compression/clean", seed, 1.0) for seed in (0, 1)),
            *(run("b", "mad_recall/clean", seed, 0.9) for seed in (0, 1, 2)),
            run("b", "mad_recall/clean", 0, 0.1, chosen=False),
            run("b", "mad_compression/clean", 0, np.nan, good=False),
        ]
    )
    table = mad_scores(runs).set_index("attention")
    assert table.loc["a", "score"] == pytest.approx(((0.8 + 0.4) / 2 + 1.0) / 2)
    assert table.loc["b", "score"] == pytest.approx(0.9)
    assert table["settings"].to_dict() == {"a": 3, "b": 1} and set(table["settings_all"]) == {3}
    assert list(table.index) == ["b", "a"], "best first"


def test_who_looks_ahead_stands_behind_the_others_and_is_named():
    runs = pd.DataFrame(
        [
            run(name, "mad_recall/clean", 0, 0.5 + bool(leaks) / 4, leaks=leaks)
            for name, leaks in (("a", None), ("b", "x"))
        ]
    )
    assert mad_scores(runs)["attention"].tolist() == ["a", "b"]
    page = mad_page._page("title", mad_scores(runs), runs)
    assert "looks ahead, not ranked: b (x)" in page
    assert "looks ahead" not in mad_page._page("title", mad_scores(runs[:1]), runs[:1])


def test_seeds_give_an_interval_and_one_seed_gives_none():
    values = [0.5, 0.6, 0.7]
    several = pd.DataFrame([run("a", "mad_recall/clean", i, value) for i, value in enumerate(values)])
    row = mad_scores(several).iloc[0]
    half = 4.302653 * np.std(values, ddof=1) / 3**0.5  # Student's t at 97.5 %, two degrees of freedom
    assert (row["low"], row["high"]) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-5)
    two = mad_scores(pd.concat([several, several.assign(skill="mad_compression", setting="mad_compression/clean")]))
    assert two.iloc[0]["high"] - 0.6 < 0.7 * half, "two skills of independent seeds, each at half the weight"
    alone = mad_scores(several.iloc[:1]).iloc[0]
    assert np.isnan(alone["low"]) and np.isnan(alone["high"])


def test_boards_are_not_mixed():
    table = mad_scores(pd.DataFrame([run("a", f"mad_recall/{p}", 0, v) for p, v in (("clean", 0.5), ("mad", 0.9))]))
    assert table.set_index("protocol")["score"].to_dict() == {"clean": 0.5, "mad": 0.9}


def test_runs_are_those_of_the_boards_of_madness_only():
    assert mad_runs(boards(frames(("softmax", "based"), trouble=False))).empty and mad_scores(mad_runs([])).empty
    setting = dict(task_id="mad_recall/clean,length=9")
    made = boards(frames(("softmax", "based"), trouble=False, **setting))
    own = mad_runs(made)
    assert set(own["protocol"]) == {"clean"} and set(own["setting"]) == {"mad_recall/clean,length=9"}
    scores = mad_scores(own)
    assert scores["attention"].tolist() == ["softmax", "based"]
    means = made[0].table.set_index("attention")["test_mean"]
    assert scores.set_index("attention")["score"].to_dict() == pytest.approx(means.to_dict()), "the board's own means"
    old = frames(("based",), trouble=False, cell_id="old", started_at="2026-01-01T00:00:00+00:00", **setting)
    old.scores["value"] = 0.0
    both = mad_scores(mad_runs(boards(joined(old, frames(("softmax", "based"), trouble=False, **setting)))))
    assert both.equals(scores), "what the board sets aside counts nowhere"


def test_the_page_has_a_row_per_mechanism_and_a_column_per_setting():
    rows = [*(("based", s, 0.5) for s in (0, 1)), *(("softmax", s, 0.9) for s in (0, 1))]
    parts = [
        [
            synthetic_run(name, 0.01, seed, "ok", "", task=task, task_id=task_id, backbone="b", budget="small")
            for name, seed, _ in rows
        ]
        for task, task_id in (
            ("mad_recall", "mad_recall/clean"),
            ("mad_recall(setting=1)", "mad_recall/clean,length=9"),
        )
    ]
    runs = [dict(run, run_id=f"{run['task']}{run['attention']}{run['seed']}") for part in parts for run in part]
    value = {name: score for name, _, score in rows}
    scores = [
        dict(run_id=run["run_id"], split=split, metric="accuracy", value=value[run["attention"]], count=10,
             slice_key="all", slice_value="")
        for run in runs
        for split in ("valid", "test")
    ]  # fmt: skip
    made = mad_page.pages(boards(Frames.from_rows(runs, scores, [])), dict(backbone="conv_decoder", budget="small"))
    assert list(made) == ["mad-clean-b"]
    page, table = made["mad-clean-b"]["mad.md"].decode(), made["mad-clean-b"]["mad.csv"].decode().splitlines()
    assert "| softmax   | 0.900 [0.900, 0.900] |   2 of 2 |" in page and page.index("softmax") < page.index("| based")
    assert table[0].endswith('mad_recall/clean,"mad_recall/clean,length=9"') and table[1].startswith("softmax,0.9,")
