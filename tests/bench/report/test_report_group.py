"""Groups of boards: which there are, what stands in a row, the page, the files."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from grouped import board, joined, patterns, reason
from rich.console import Console
from synthetic import frames

from bench import report, tables
from bench.report import figure, group_page, group_plot
from bench.report.composite import PATTERNS
from bench.report.frames import Frames
from bench.report.group import GroupKey, folder_names, groups
from bench.report.leaderboard import boards

DEFAULTS = {"task": "mqar", "backbone": "conv_decoder", "attention": "softmax", "budget": "small"}


def group_of(data, **options):
    (only,) = groups(boards(data), **options)
    return only


def row(group, attention):
    return group.table.set_index("attention").loc[attention]


def write(data, folder, **options):
    return report.write(data, folder, defaults=DEFAULTS, **options)


@pytest.fixture(scope="module")
def data():
    return patterns()


@pytest.fixture(scope="module")
def group(data):
    return group_of(data)


# -- which boards, which numbers --------------------------------------------------------------------


def test_boards_of_a_group_and_a_budget_are_read_together_in_the_order_of_the_patterns(data):
    other = joined(data, frames(("softmax",)), board("causal self", "lonely", group="alone"), patterns(budget="smoke"))
    found = groups(boards(other))
    assert [g.key for g in found] == [("patterns", "small"), ("patterns", "smoke")]
    assert [[c.pattern for c in g.columns] for g in found] == [list(PATTERNS)] * 2


RECORD = dict(
    run_id="r", attempt=1, config_id="c", cell_id="c", status="ok", reason="", seed=0, learning_rate=0.01,
    task=dict(version=1), names=dict(task="t", backbone="b", attention="a", budget="s"), precision="float32",
    config=dict(budget=dict(max_steps=5)), environment=dict(torch="2", python="3"), started_at="2026-11-24",
)  # fmt: skip


def test_group_and_pattern_come_from_the_record_and_may_be_absent(monkeypatch):
    monkeypatch.setattr(tables, "_conditions", lambda record: "conditions")
    new = {**RECORD, "run_id": "s", "task": {"version": 1, "group": "patterns"}, "pattern": "causal cross"}
    runs = Frames.from_rows([tables._run(record, False) for record in (RECORD, new)], [], []).runs
    assert runs["task_group"].isna().tolist() == runs["pattern"].isna().tolist() == [True, False]
    assert runs.loc[1, ["task_group", "pattern"]].tolist() == ["patterns", "causal cross"]


def test_records_without_a_group_make_none():
    several = joined(
        board("causal self", "a", group=None), board("causal cross", "b", group=None), frames(("softmax",))
    )
    assert groups(boards(several)) == []


def test_a_run_that_died_before_it_knew_its_group_does_not_hide_it():
    one, other = board("causal self", "a"), board("causal cross", "b")
    first = one.runs.index[0]
    one.runs.loc[first, ["task_group", "pattern"]] = pd.NA
    one.runs.loc[first, "started_at"] = "2027-01-01T00:00:00+00:00"
    assert [c.pattern for c in group_of(joined(one, other)).columns] == ["causal self", "causal cross"]


def test_a_board_that_does_not_know_its_pattern_stands_for_itself_at_the_end():
    found = group_of(joined(board(None, "unknown", lacks={}), board("causal cross", "b"), board("causal self", "c")))
    assert [c.label for c in found.columns] == ["causal self", "causal cross", "unknown"]


def test_the_reference_set_is_every_mechanism_with_all_seeds_in_all_boards(group):
    # linear lost a seed in causal cross, the others lack a pattern
    assert group.reference == ["none", "softmax", "uniform"]
    assert group.table.loc[group.table["in_reference"], "attention"].tolist() == ["softmax", "uniform", "none"]


def test_a_row_that_looks_ahead_in_one_board_is_neither_reference_nor_in_its_index():
    data = patterns()
    data.runs["leaks"] = data.runs["leaks"].mask(
        (data.runs["attention"] == "short_conv") & (data.runs["pattern"] == "causal self"), "it ranks all keys"
    )
    (before,), (after,) = groups(boards(patterns())), groups(boards(data))
    cells = [g.table.set_index("attention").loc["short_conv"] for g in (before, after)]
    assert cells[1]["cells"] == cells[0]["cells"] - 1
    assert cells[1]["score_causal self"] == cells[0]["score_causal self"]
    data.runs["leaks"] = data.runs["leaks"].mask(data.runs["attention"] == "uniform", "it ranks all keys")
    assert "uniform" in before.reference and "uniform" not in groups(boards(data))[0].reference


def test_z_and_index_follow_from_the_scores_of_the_reference_set(group):
    parts = []
    for column in group.columns:
        scores = column.board.table.set_index("attention")["test_mean"]
        own = scores[group.reference]
        parts.append((scores["linear"] - own.mean()) / own.std(ddof=1))
    linear = row(group, "linear")
    assert [linear[f"z_{name}"] for name in PATTERNS] == pytest.approx(parts)
    assert linear["composite"] == pytest.approx(np.mean(parts))
    assert linear["to_softmax"] == pytest.approx(linear["composite"] - row(group, "softmax")["composite"])
    assert linear["composite_low"] < linear["composite"] < linear["composite_high"]


def test_a_rank_is_the_middle_of_the_ranks_that_seeds_leave_possible(group):
    expected = []
    for column in group.columns:
        own = column.board.table.set_index("attention").loc["uniform"]
        expected.append((own["rank_best"] + own["rank_worst"]) / 2)
    assert [row(group, "uniform")[f"rank_{name}"] for name in PATTERNS] == expected
    assert row(group, "uniform")["mean_rank"] == pytest.approx(np.mean(expected))


def test_rows_that_lack_a_board_stand_below_and_say_how_many_they_have(group):
    assert group.table["attention"].tolist() == [
        *("softmax", "uniform", "linear", "none"),
        *("gla", "sliding_window(window=32)", "short_conv", "delta_net", "nystrom"),
    ]
    assert group.table["cells"].tolist() == [4, 4, 4, 4, 2, 2, 2, 1, 0]
    delta, softmax = row(group, "delta_net"), row(group, "softmax")
    assert delta["composite"] == delta["z_causal self"] and delta["cells_all"] == 4
    assert delta["to_softmax"] == pytest.approx(delta["z_causal self"] - softmax["z_causal self"])


def test_a_named_reference_set_is_used_as_it_is(data):
    named = group_of(data, reference=["softmax", "none"])
    assert named.reference == ["softmax", "none"]
    assert row(named, "softmax")["composite"] == pytest.approx(2**-0.5)


def test_two_boards_of_one_pattern_are_averaged_before_patterns_are():
    names = ("softmax", "none")
    found = group_of(
        joined(
            board("causal self", "a", names), board("causal self", "b", names[::-1]), board("causal cross", "c", names)
        )
    )
    assert [c.label for c in found.columns] == ["causal self: a", "causal self: b", "causal cross"]
    assert found.patterns == ["causal self", "causal cross"]
    assert row(found, "softmax")["composite"] == pytest.approx(2**-0.5)


def test_one_task_on_two_backbones_makes_two_boards_of_the_pattern():
    one = board("causal self", "a", ("softmax", "none"))
    other = board("causal self", "a", ("softmax", "none"), backbone="decoder", conditions_id="other")
    other.runs["run_id"] += "x"
    other.scores["run_id"] += "x"
    found = group_of(joined(one, other))
    assert [c.label for c in found.columns] == ["causal self: a · conv_decoder", "causal self: a · decoder"]
    assert row(found, "softmax")["cells"] == 2


def test_perplexity_counts_by_its_logarithm_and_lower_is_better():
    names = ("softmax", "linear", "none")
    data = joined(
        *(board(p, p, names, metric="perplexity", metric_unit="", higher_is_better=False) for p in PATTERNS[:2])
    )
    data.scores["metric"] = data.scores["metric"].replace("accuracy", "perplexity")
    level = {"softmax": 3.0, "linear": 30.0, "none": 300.0}
    attention = data.scores["run_id"].map(data.runs.set_index("run_id")["attention"])
    data.scores["value"] = attention.map(level)
    found = group_of(data)
    assert found.logarithmic == ["perplexity"]
    assert found.table["composite"].tolist() == pytest.approx([1, 0, -1])
    assert "logarithm of perplexity" in " ".join(group_page.conditions(found).values())


# -- the page ---------------------------------------------------------------------------------------


def page_of(group):
    return group_page.page(group, {c.board.key: f"../{c.task}/leaderboard.md" for c in group.columns}, {})


def line_of(page, heading, *words):
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("| ") and all(f"| {w} " in line for w in words)]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_page_names_its_reference_set_and_shows_scores_z_index_and_coverage(group):
    page = page_of(group)
    assert "**Reference set (3)** none, softmax, uniform." in page
    softmax = line_of(page, "Composite index", "softmax")
    assert softmax[0] == "softmax" and softmax[2:9] == [*("+0.00", "1.1", "4 of 4"), "1.000", "0.930", "0.860", "0.790"]
    assert re.fullmatch(r"\+1\.05 \[\+1\.05, \+1\.05\]", softmax[1]) and softmax[9] == "+1.08"
    assert line_of(page, "Composite index", "delta_net")[4:9] == [
        *("1 of 4", "unsupported", "0.902", "unsupported", "unsupported")
    ]
    assert line_of(page, "Composite index", "uniform")[-1] == "floor"
    assert line_of(page, "Composite index", "(chance)")[5:9] == ["0.008"] * 4
    assert "stand below the others: gla (2 of 4)" in page and "Only 3 mechanisms make the reference set" in page
    assert "the mean of the others flatters: linear in causal cross." in page
    assert "[recall_causal_self · conv_decoder · small](../recall_causal_self/leaderboard.md)" in page


def test_every_cell_without_a_result_stands_with_its_reason(group):
    page = page_of(group)
    assert line_of(page, "Cells without", "nystrom", "causal self", "unsupported")[3] == reason(
        "nystrom", "causal self"
    )
    assert len(group_page.failures(group)) == 4 + 3 + 2 * 3  # nystrom, delta_net, and three without cross


def test_a_mechanism_that_was_not_run_in_a_board_says_so():
    found = group_of(
        joined(
            board("causal self", "a", ("softmax", "none", "linear")), board("causal cross", "b", ("softmax", "none"))
        )
    )
    assert row(found, "linear")["status_causal cross"] == "not run"
    assert ["causal cross", "linear", "not run", ""] in group_page.failures(found)


def test_without_a_reference_set_there_is_no_index_and_the_page_says_why():
    lacks = {"none": ("causal self",), "linear": ("causal cross",)}
    found = group_of(
        joined(*(board(p, p, ("softmax", "none", "linear"), lacks) for p in ("causal self", "causal cross")))
    )
    assert found.reference == ["softmax"]
    assert found.table["composite"].isna().all() and found.table["mean_rank"].notna().all()
    page = page_of(found)
    assert "No z in causal self: the reference set has 1 of the 2 values that a spread needs" in page
    assert not re.search(r"\b(None|<NA>|nan|NaN)\b", page)


# -- files ------------------------------------------------------------------------------------------


@pytest.fixture
def light(monkeypatch):
    """Boards without plots: their files have tests of their own."""
    monkeypatch.setattr(report, "contents", lambda board: {"leaderboard.md": b"board"})


def test_files_of_a_group_are_written_and_read_back_in_full(data, group, tmp_path, light):
    paths = write(data, tmp_path, only=[("recall_causal_self", "conv_decoder", "small")])
    assert {p.parent.name for p in paths} == {
        "recall_causal_self",
        "patterns",
    }  # the board's group is rewritten with it
    assert [p.name for p in paths if p.parent.name == "patterns"] == ["index.md", "index.csv", "patterns.png"]
    assert sorted(p.name for p in (tmp_path / "patterns").iterdir()) == ["index.csv", "index.md", "patterns.png"]
    table = pd.read_csv(tmp_path / "patterns" / "index.csv")
    assert table["composite"].tolist()[:8] == group.table["composite"].tolist()[:8]  # every digit
    assert table["z_causal_self"].tolist()[:4] == group.table["z_causal self"].tolist()[:4]
    before = {p: p.read_bytes() for p in (tmp_path / "patterns").iterdir()}
    shuffled = type(data)(
        *(getattr(data, name).sample(frac=1, random_state=3) for name in ("runs", "scores", "history"))
    )
    write(shuffled, tmp_path, only=[("recall_causal_cross", "conv_decoder", "small")])
    assert {p: p.read_bytes() for p in (tmp_path / "patterns").iterdir()} == before


def test_a_board_outside_the_group_does_not_rewrite_it(data, tmp_path, light):
    paths = write(joined(data, frames(("softmax",))), tmp_path, only=[("mqar", "conv_decoder", "small")])
    assert {p.parent.name for p in paths} == {"mqar"}


def test_a_group_folder_is_never_that_of_a_board():
    keys = [
        GroupKey("patterns", "small"),
        GroupKey("patterns", "smoke"),
        GroupKey("../up", "small"),
        GroupKey("mqar", "small"),
    ]
    names = folder_names(keys, DEFAULTS, taken=["mqar", "Patterns-smoke"])
    assert names[keys[0]] == "patterns" and names[keys[2]] == "up"
    assert re.fullmatch(r"patterns-smoke-[0-9a-f]{8}", names[keys[1]])
    assert re.fullmatch(r"mqar-[0-9a-f]{8}", names[keys[3]])


FEW = {
    "all failed": lambda: joined(*(board(p, p, ("gla",), {}, fail=("gla",)) for p in PATTERNS[:2])),
    "one mechanism": lambda: joined(*(board(p, p, ("softmax",)) for p in PATTERNS[:2])),
    "one board without results": lambda: joined(
        board("causal self", "a", ("softmax", "none")),
        board("causal cross", "b", ("softmax", "none"), fail=("softmax", "none")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FEW)
def test_a_page_is_written_whatever_there_is(case, tmp_path, light):
    data = FEW[case]()
    paths = write(data, tmp_path)
    (page,) = [p for p in paths if p.name == "index.md"]
    assert not re.search(r"\b(None|<NA>|nan|NaN)\b", page.read_text())
    console = Console(width=160, file=(tmp_path / "out").open("w"))
    for table in report.tables(data):
        console.print(table)


def test_a_group_table_follows_the_boards_in_the_terminal(data, tmp_path):
    tables = report.tables(data, only=[("recall_causal_self", "conv_decoder", "small")])
    assert len(tables) == 2
    with (tmp_path / "out").open("w") as out:
        Console(width=160, file=out).print(tables[1])
    text = Path(tmp_path / "out").read_text()
    assert re.search(r"softmax\s+\+1\.05 \[\+1\.05, \+1\.05\]\s+\+0\.00\s+1\.1\s+4 of 4\s+1\.000\s+0\.930", text)
    assert "reference set: none, softmax, uniform" in text


# -- the plot ---------------------------------------------------------------------------------------


def test_the_plot_shows_scores_statuses_and_intervals(group):
    with matplotlib.style.context(["default", figure.STYLE]):
        drawn = group_plot.patterns(group)
        drawn.draw_without_rendering()
    heat, dots = drawn.axes
    names = [label.get_text() for label in heat.get_yticklabels()]
    assert names[0] == "softmax" and "nystrom" not in names
    texts = {(round(t.get_position()[0] - 0.5), round(t.get_position()[1] - 0.5)): t.get_text() for t in heat.texts}
    assert texts[1, names.index("delta_net")] == "0.902" and texts[0, names.index("delta_net")] == "unsupported"
    points = {
        round(line.get_ydata()[0] - 0.5): line.get_xdata()[0] for line in dots.lines if len(line.get_xdata()) == 1
    }
    assert points[names.index("linear")] == row(group, "linear")["composite"]
    assert [text.get_text() for text in dots.texts] == ["2 of 4"] * 3 + ["1 of 4"]
    extent, (width, height) = drawn.get_tightbbox(drawn.canvas.get_renderer()), drawn.get_size_inches()
    assert extent.x0 > -0.02 and extent.y0 > -0.02 and extent.x1 < width + 0.02 and extent.y1 < height + 0.02
