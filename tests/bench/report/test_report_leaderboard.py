"""Boards of synthetic frames: what is chosen, ranked, shown as failed and left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from synthetic import MECHANISMS, RATES, frames, run, score_rows

from bench.report import markdown, wording
from bench.report.frames import Frames
from bench.report.leaderboard import Key, boards, folder_names

DEFAULTS = {"task": "mqar", "backbone": "conv_decoder", "attention": "softmax", "budget": "small"}


@pytest.fixture(scope="module")
def board():
    (only,) = boards(frames())
    return only


def row(board, attention):
    return board.table.set_index("attention").loc[attention]


def joined(*several: Frames) -> Frames:
    return Frames(*(pd.concat([getattr(f, name) for f in several]) for name in ("runs", "scores", "history")))


def test_every_mechanism_has_exactly_one_row_and_the_failed_ones_stand_last(board):
    assert sorted(board.table["attention"]) == sorted([*MECHANISMS, "nystrom", "hyena|long"])
    assert board.table["attention"].tolist()[-2:] == ["hyena|long", "nystrom"]
    assert board.table["rank_best"].isna().tolist() == [False] * 12 + [True] * 2
    assert board.table["test_mean"].dropna().is_monotonic_decreasing


def test_means_are_of_test_at_the_rate_that_is_best_on_valid():
    data = frames(("softmax",), trouble=False)
    whole = data.scores["slice_key"] == "all"
    accuracy = data.scores["metric"] == "accuracy"
    rate = data.scores["run_id"].map(data.runs.set_index("run_id")["learning_rate"])
    # valid says 0.03, test would say 0.003
    data.scores.loc[whole & accuracy & (data.scores["split"] == "valid"), "value"] = rate
    data.scores.loc[whole & accuracy & (data.scores["split"] == "test"), "value"] = 0.5 - rate
    (board,) = boards(data)
    assert row(board, "softmax")["learning_rate"] == 0.03
    assert row(board, "softmax")["test_mean"] == pytest.approx(0.47)
    assert row(board, "softmax")["valid_mean"] == pytest.approx(0.03)


def test_a_row_that_looks_ahead_has_its_numbers_and_no_rank():
    names = ("softmax", "based", "none")
    data = frames(names, trouble=False)
    whole, (before,) = data.runs["attention"] == "softmax", boards(data)
    data.runs.loc[whole, "leaks"] = "the order of queries depends on later ones"
    (board,) = boards(data)
    assert before.ranked == [*names] and board.ranked == ["based", "none"]
    assert board.table["attention"].tolist() == ["based", "none", "softmax"]
    softmax = row(board, "softmax")
    assert softmax["test_mean"] == row(before, "softmax")["test_mean"]
    assert wording.rank(softmax) == "–"
    assert wording.note(softmax) == "not ranked, looks ahead: the order of queries depends on later ones"
    assert row(board, "based")["rank_best"] == 1
    text = markdown.page(board, {})
    assert "looks ahead" in text and "## Runs without a result" not in text


def test_a_busy_machine_is_said_beside_the_times():
    data = frames(("softmax", "none"), trouble=False)
    assert not [line for line in wording.warnings(boards(data)[0]) if "other work" in line]
    data.runs.loc[data.runs["seed"] == 1, "load"] = 2.5
    (line,) = [line for line in wording.warnings(boards(data)[0]) if "other work" in line]
    assert line.startswith("The machine did other work beside 6 of 18 runs (load per core up to 2.5): times are not")


def test_runs_that_shared_a_gpu_are_said_beside_the_times():
    data = frames(("softmax", "none"), trouble=False)
    data.runs["gpu_runs"] = 1.0
    assert not [line for line in wording.warnings(boards(data)[0]) if "shared a GPU" in line]
    data.runs.loc[data.runs["seed"] == 1, "gpu_runs"] = 13.0
    (line,) = [line for line in wording.warnings(boards(data)[0]) if "shared a GPU" in line]
    assert line.startswith("Up to 13 runs at once shared a GPU: times are not")


def test_a_search_by_the_first_seed_counts_its_own_runs():
    whole = frames(("softmax", "none"), trouble=False, search="first_seed")
    chosen = boards(whole)[0].runs
    kept = whole.of(chosen[(chosen["seed"] == 0) | chosen["chosen"]])
    (board,) = boards(kept)
    assert (len(board.runs), board.planned) == (10, 10)
    assert "2 seeds at the rate best on valid) = 10 planned: 10 ok" in wording.conditions(board)["Runs"]
    assert not [line for line in wording.warnings(board) if "missing" in line]
    assert [len(values.split()) for values in board.table["seed_values"]] == [3, 3]
    (short,) = boards(kept.of(kept.runs.drop(index=kept.runs.index[kept.runs["seed"] == 2][0])))
    assert short.planned == 10 and "1 runs of the grid are missing; ranks are provisional." in wording.warnings(short)


def test_a_failed_seed_is_shown_counted_as_unsolved_and_never_ranked_above(board):
    hybrid = row(board, "hybrid")
    assert (hybrid["seeds_ok"], hybrid["seeds_run"]) == (2, 3)
    assert hybrid["status"] == "diverged" and "61.2" in hybrid["reason"]
    assert hybrid["seed_values"].split()[2] == "diverged"
    assert hybrid["rank_worst"] == 12
    data = frames(("softmax", "none"), trouble=False)
    lost = (data.runs["attention"] == "softmax") & (data.runs["seed"] == 1)
    data.runs.loc[lost, ["status", "reason"]] = ["timeout", "over 300 s"]
    softmax = row(boards(data)[0], "softmax")
    assert softmax["solve_rate"] == pytest.approx(2 / 3) and softmax["status"] == "timeout"


def test_an_ok_run_without_scores_is_a_failure_with_a_reason():
    data = frames(("softmax",), seeds=(0,), rates=(0.01,), trouble=False)
    (board,) = boards(Frames(data.runs, data.scores.iloc[:0], data.history))
    assert row(board, "softmax")["reason"] == "no score on valid or test"
    assert board.ranked == []


def test_failed_and_unsupported_rows_keep_their_words(board):
    assert row(board, "nystrom")["status"] == "unsupported"
    assert row(board, "nystrom")["reason"].startswith("Nystrom is not defined")
    assert row(board, "hyena|long")["status"] == "oom"
    mixed = frames(("gla",), fail=("gla",), trouble=False)
    mixed.runs.loc[:1, "status"] = "oom"
    assert row(boards(mixed)[0], "gla")["status"] == "diverged 7, oom 2"


def test_edges_are_marked_below_the_ceiling_only(board):
    assert row(board, "retention")["edge"] == "largest"
    assert row(board, "based_hybrid")["learning_rate"] == max(RATES) and row(board, "based_hybrid")["valid_mean"] > 0.99
    assert pd.isna(row(board, "based_hybrid")["edge"])
    (strict,) = boards(frames(), solved=0.9999)
    assert row(strict, "based_hybrid")["edge"] == "largest"


def test_a_page_says_where_only_one_learning_rate_was_run(board):
    (one,) = boards(frames(("softmax", "none"), rates=(0.003,), trouble=False))
    said = "One learning rate (0.003) for all: none was chosen, and with another ranks may differ."
    assert said in wording.warnings(one) and "- **learning rate**: the only one that was run." in markdown.page(one, {})
    assert not [line for line in wording.warnings(board) if line.startswith("One learning rate")]
    assert "**learning rate**: chosen by `valid` alone" in markdown.page(board, {})


def test_solve_rate_uses_the_threshold_that_is_passed_in(board):
    assert row(board, "softmax")["solved"] == 3 and row(board, "gated_delta_net")["solved"] == 0
    (lenient,) = boards(frames(), solved=0.5)
    assert row(lenient, "gated_delta_net")["solve_rate"] == 1.0


def test_stale_runs_are_listed_and_never_ranked(board):
    assert board.set_aside.values.tolist() == [
        ["linear", "stale: its code, its task or the training program has changed since", 9]
    ]
    assert not board.runs["stale"].any()
    (old,) = boards(frames(stale=True))
    assert old.ranked == [] and old.runs.empty and old.set_aside["runs"].sum() == 135


def test_runs_under_other_conditions_are_not_pooled():
    new = frames(("softmax", "based"), trouble=False)
    old = frames(("softmax", "none"), trouble=False, conditions_id="before", started_at="2026-01-01T00:00:00+00:00")
    (board,) = boards(joined(old, new))
    assert board.ranked == ["softmax", "based"]
    assert board.set_aside["why"].str.startswith("other conditions").all() and board.set_aside["runs"].sum() == 18


def test_runs_on_other_data_of_the_same_seed_are_not_pooled():
    new = frames(("softmax", "based"), trouble=False, data_id="new")
    old = frames(("none",), trouble=False, data_id="old", started_at="2026-01-01T00:00:00+00:00")
    failed = frames(("gla",), trouble=False, fail=("gla",), data_id=None)  # nothing is known of its data
    (board,) = boards(joined(joined(old, new), failed))
    assert board.ranked == ["softmax", "based"] and (board.table["attention"] == "gla").any()
    assert board.set_aside.values.tolist() == [["none", "other data: those of this seed are not what they were", 9]]
    unseeded = joined(new, frames(("none",), seeds=(3,), trouble=False, data_id="old", started_at="2026-01-01"))
    (board,) = boards(unseeded)
    assert board.ranked == ["softmax", "based", "none"]  # seeds may have data of their own
    unseeded.runs["data_seed"] = 0
    assert boards(unseeded)[0].ranked == ["softmax", "based"]


def test_an_edited_mechanism_of_the_same_name_replaces_the_old_one():
    old = frames(("based",), trouble=False, cell_id="old", started_at="2026-01-01T00:00:00+00:00")
    new = frames(("based",), seeds=(0,), trouble=False)
    (board,) = boards(joined(old, new))
    assert row(board, "based")["seeds_run"] == 1
    assert board.set_aside[["attention", "runs"]].values.tolist() == [["based", 9]]


def test_times_of_two_devices_stay_apart():
    one, other = frames(("based",), trouble=False), frames(("softmax",), trouble=False, device="NVIDIA H200")
    mixed = joined(one, other)
    mixed.runs.loc[(mixed.runs["attention"] == "based") & (mixed.runs["seed"] == 1), "device"] = "NVIDIA H200"
    (board,) = boards(mixed)
    assert board.costs[["attention", "device"]].values.tolist() == [
        ["based", "AMD EPYC 7763"],
        ["based", "NVIDIA H200"],
        ["softmax", "NVIDIA H200"],
    ]
    assert pd.isna(row(board, "based")["tokens_per_second"]) and row(board, "based")["state_bytes"] == 67072
    assert row(board, "softmax")["tokens_per_second"] == 139_100


def test_slices_are_means_over_seeds_at_the_chosen_rate(board):
    ids = board.runs.loc[board.runs["chosen"] & board.runs["good"] & (board.runs["attention"] == "hybrid"), "run_id"]
    part = board.frames.scores.query("split == 'test' and slice_key == 'segment' and slice_value == '64x16'")
    expected = part[part["run_id"].isin(ids)]["value"]
    got = board.slices.query("attention == 'hybrid' and slice_key == 'segment' and slice_value == '64x16'").iloc[0]
    assert got["seeds"] == 2 and got["mean"] == pytest.approx(np.mean(expected))


def test_lower_is_better_ranks_upwards_and_solves_nothing():
    (board,) = boards(frames(("softmax", "none"), trouble=False, metric_unit="nats", higher_is_better=False))
    assert board.ranked == ["none", "softmax"]
    assert board.table["solved"].isna().all()


def test_boards_are_split_by_task_backbone_and_budget():
    several = joined(frames(trouble=False), frames(("softmax",), trouble=False, budget="smoke"))
    assert [b.key for b in boards(several)] == [("mqar", "conv_decoder", "small"), ("mqar", "conv_decoder", "smoke")]
    assert [b.key.budget for b in boards(several, only=[("mqar", "conv_decoder", "smoke")])] == ["smoke"]


def test_folders_leave_out_the_defaults_and_never_collide():
    keys = [
        Key("mqar", "conv_decoder", "small"),
        Key("mqar", "decoder", "small"),
        Key("mqar", "conv_decoder", "smoke"),
        Key("mqar(vocab_size=64,x=[1,2])", "conv_decoder", "small"),
        Key("../../etc", "conv_decoder", "small"),
        Key("a" * 300, "conv_decoder", "small"),
        Key("mqar-decoder", "conv_decoder", "small"),
        Key("()", "conv_decoder", "small"),
    ]
    names = folder_names(keys, DEFAULTS)
    assert names[keys[0]] == "mqar" and names[keys[2]] == "mqar-smoke"
    assert names[keys[3]] == "mqar-vocab_size_64-x_-1-2"
    assert len({name.casefold() for name in names.values()}) == len(keys)  # mqar + decoder against mqar-decoder
    for name in names.values():
        assert "/" not in name and not name.startswith(".") and 0 < len(name) < 120


def test_a_row_with_a_wrong_column_is_refused():
    good = run("softmax", 0.01, 0, "ok", "")
    with pytest.raises(ValueError, match="colour"):
        Frames.from_rows([{**good, "colour": "red"}], [], [])
    del good["seed"]
    with pytest.raises(ValueError, match="seed"):
        Frames.from_rows([good], [], [])


def test_frames_do_not_depend_on_the_order_of_records():
    runs = [run("softmax", rate, seed, "ok", "") for rate in RATES for seed in (0, 1, 2)]
    scores = [row for r in runs for row in score_rows(r["run_id"], 0.9, 0.1, 0)]
    one, other = Frames.from_rows(runs, scores, []), Frames.from_rows(runs[::-1], scores[::-1], [])
    pd.testing.assert_frame_equal(one.runs, other.runs)
    pd.testing.assert_frame_equal(one.scores, other.scores)


def test_missing_values_are_missing_and_types_are_kept_without_rows():
    empty, failed = Frames.from_rows([], [], []), Frames.from_rows([run("x", 0.1, 0, "oom", "")], [], [])
    assert failed.runs["metric"].isna().all() and failed.runs["state_bytes"].isna().all()
    assert (empty.runs.dtypes == failed.runs.dtypes).all()
