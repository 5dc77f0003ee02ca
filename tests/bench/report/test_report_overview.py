"""The page over all boards of a folder."""

from __future__ import annotations

import pytest
import sliced
from synthetic import frames

from bench import report
from bench.report import overview
from bench.report.leaderboard import boards

DEFAULTS = dict(backbone="conv_decoder", budget="small")


def test_every_board_is_a_line_with_what_tells_mechanisms_apart(tmp_path):
    for name in ("listops", "forecast", "language"):
        report.write(sliced.ALL[name](task=name, task_id=f"{name}/t"), tmp_path, defaults=DEFAULTS)
    report.write(frames(trouble=False), tmp_path, defaults=DEFAULTS)  # boards of earlier reports stay on the page
    (path,) = report.write_overview(tmp_path)
    assert path == tmp_path / overview.NAME
    text = path.read_text()
    lines = {
        line.split()[1].strip("[]"): [c.strip() for c in line.split("|")[1:-1]]
        for line in text.splitlines()
        if "[" in line and "|" in line
    }
    assert list(lines) == ["forecast", "language", "listops", "mqar"]
    assert lines["mqar"][1:] == [
        *("accuracy", "12", "3", "3", "softmax 1.000", "1.000", "0.008", "chance 0.008", "12 of 12"),
    ]
    (floor, *_) = boards(sliced.ALL["listops"]())[0].solvers.values()
    assert lines["listops"][8] == f"root operator {floor:.3f}" and lines["listops"][9].endswith("of 10")
    assert lines["forecast"][1].endswith("lower is better")
    best, softmax = float(lines["forecast"][5].split()[-1]), float(lines["forecast"][6])
    assert best <= softmax < float(lines["forecast"][7])
    assert all(f"[{name}]: {name}/leaderboard.md" in text for name in lines)


@pytest.mark.parametrize(("name", "values"), [("listops", (0.6, 0.1)), ("forecast", (0.01, 9.0))])
def test_a_row_is_above_the_solver_with_its_whole_interval(name, values, tmp_path):
    facts = dict(task="t", task_id="t/t", names=("softmax", "none"))
    report.write(sliced.ALL[name](values=values, **facts), tmp_path, defaults=DEFAULTS)
    assert "| 1 of 2 |" in overview.page(tmp_path).decode().replace("   ", " ").replace("  ", " ")


def test_what_is_no_board_is_left_out(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "leaderboard.csv").write_text("a,b\n1,2\n")
    assert "[odd]" not in overview.page(tmp_path).decode()


def test_scores_over_several_boards_are_linked(tmp_path):
    assert b"over several" not in overview.page(tmp_path)
    for name, file in (("mad-clean-b", "mad.md"), ("patterns", "index.md"), ("mqar", "leaderboard.md")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("x")
    linked = "Scores over several boards: [mad-clean-b](mad-clean-b/mad.md), [patterns](patterns/index.md).\n"
    assert linked in overview.page(tmp_path).decode()
