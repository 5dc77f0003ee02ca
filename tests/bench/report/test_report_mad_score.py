"""MAD's score on runs whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bench.report import mad_page
from bench.report.frames import Frames
from bench.report.mad_score import mad_runs, mad_scores
from tests.bench.report.synthetic import frames
from tests.bench.report.synthetic import run as synthetic_run


def run(attention, setting, rate, seed, valid, test):
    board = dict(protocol="clean", backbone="b", budget="small")
    return dict(**board, attention=attention, setting=setting, learning_rate=rate, seed=seed, valid=valid, test=test)


def test_the_rate_is_chosen_on_valid_and_settings_count_alike():
    runs = pd.DataFrame(
        [
            *(run("a", "mad_recall/clean", 0.1, seed, 0.9, 0.8) for seed in (0, 1)),
            *(run("a", "mad_recall/clean", 0.01, seed, 0.7, 1.0) for seed in (0, 1)),  # better on test: not chosen
            *(run("a", "mad_recall/clean,length=9", 0.01, seed, 0.5, 0.4) for seed in (0, 1)),
            *(run("b", "mad_recall/clean", 0.1, seed, 0.5, 0.7) for seed in (0, 1, 2)),
        ]
    )
    table = mad_scores(runs).set_index("attention")
    assert table.loc["a", "score"] == pytest.approx((0.8 + 0.4) / 2)
    assert table.loc["b", "score"] == pytest.approx(0.7)
    assert table["settings"].to_dict() == {"a": 2, "b": 1} and set(table["settings_all"]) == {2}
    assert list(table.index) == ["b", "a"], "best first"


def test_seeds_give_an_interval_and_one_seed_gives_none():
    values = [0.5, 0.6, 0.7]
    several = pd.DataFrame([run("a", "mad_recall/clean", 0.1, i, 0.5, value) for i, value in enumerate(values)])
    row = mad_scores(several).iloc[0]
    half = 4.302653 * np.std(values, ddof=1) / 3**0.5  # Student's t at 97.5 %, two degrees of freedom
    assert (row["low"], row["high"]) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-5)
    alone = mad_scores(several.iloc[:1]).iloc[0]
    assert np.isnan(alone["low"]) and np.isnan(alone["high"])


def test_boards_are_not_mixed():
    one, other = run("a", "mad_recall/clean", 0.1, 0, 0.5, 0.5), run("a", "mad_recall/mad", 0.1, 0, 0.9, 0.9)
    table = mad_scores(pd.DataFrame([one, {**other, "protocol": "mad"}]))
    assert table.set_index("protocol")["score"].to_dict() == {"clean": 0.5, "mad": 0.9}


def test_runs_are_read_from_frames_of_madness_only():
    plain = frames(("softmax", "based"), trouble=False)
    assert mad_runs(plain).empty and mad_scores(mad_runs(plain)).empty
    own = mad_runs(frames(("softmax", "based"), trouble=False, task_id="mad_recall/clean,length=9"))
    assert set(own["protocol"]) == {"clean"} and set(own["setting"]) == {"mad_recall/clean,length=9"}
    assert len(own) == 2 * 3 * 3 and own["valid"].notna().all() and own["test"].notna().all()
    assert mad_scores(own)["attention"].tolist() == ["softmax", "based"]


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
    made = mad_page.pages(Frames.from_rows(runs, scores, []), dict(backbone="conv_decoder", budget="small"))
    assert list(made) == ["mad-clean-b"]
    page, table = made["mad-clean-b"]["mad.md"].decode(), made["mad-clean-b"]["mad.csv"].decode().splitlines()
    assert "| softmax   | 0.900 [0.900, 0.900] |   2 of 2 |" in page and page.index("softmax") < page.index("| based")
    assert table[0].endswith('mad_recall/clean,"mad_recall/clean,length=9"') and table[1].startswith("softmax,0.9,")
