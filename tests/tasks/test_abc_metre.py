"""The metre of tunes: what is heard of ABC notation, that nothing tells the bars, variants on one side."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tasks import _abc, _disjoint
from tasks.abc_metre import LOWEST, OTHER, PITCH, REST, VALUE, VALUES, AbcMetre, _melody, _tokens
from tasks.sources import MissingData
from tests.tasks.packaged import fetched

SPLITS = "train", "valid", "test"
EIGHTH = _abc.WHOLE // 8


@pytest.fixture(scope="module")
def archive():
    return fetched("folk_tunes")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_BENCHMARK_DATA", str(tmp_path / "cache"))


def notes(body, key="C", unit="1/8"):
    return _abc.Tune({"K": [key], "L": [unit]}, body).notes()


def pitches(body, **options):
    return [pitch for pitch, _ in notes(body, **options)]


def eighths(body, **options):
    return [ticks / EIGHTH for _, ticks in notes(body, **options)]


def test_pitches_have_octaves_keys_and_accidentals_to_the_end_of_the_bar():
    assert pitches("C,C c c'") == [48, 60, 72, 84]
    assert pitches("F^FF=F|F_B__B", key="G") == [66, 66, 66, 65, 66, 70, 69]
    assert pitches("FCGB", key="A Mixolydian") == [66, 61, 67, 71]  # two sharps
    assert pitches("BEA", key="Cm") == [70, 63, 68] and pitches("BEA", key="Bb major") == [70, 63, 69]
    assert pitches("^fF f'", key="Em") == [78, 66, 90]


def test_durations_have_factors_fractions_broken_rhythms_and_tuplets():
    assert eighths("A2B/c3/2d//e/4f0") == pytest.approx([2, 0.5, 1.5, 0.25, 0.25, 0])
    assert eighths("A>BA<BA>>B") == [1.5, 0.5, 0.5, 1.5, 1.75, 0.25]
    assert eighths("(3ABcd (2AB (3:2:2ABc") == pytest.approx([2 / 3] * 3 + [1, 1.5, 1.5, 2 / 3, 2 / 3, 1])
    assert eighths("AB", unit="1/16") == [0.5, 0.5]


def test_ties_and_rests_are_joined_across_bar_lines_and_ornaments_left_out():
    assert notes("A2-|A2 B") == [(69, 4 * EIGHTH), (71, EIGHTH)]
    assert notes("A2|A2") == [(69, 2 * EIGHTH)] * 2
    assert notes("Az2|z4 x A") == [(69, EIGHTH), (_abc.REST, 7 * EIGHTH), (69, EIGHTH)]
    assert notes('{cde}"Am7"uTA !trill!.~B [CEG]2 +fine+(cd) [M:3/4]e') == notes("AB C2 cd e")


def test_nothing_of_bars_beams_lines_and_repeats_is_left():
    assert notes("|:ABc def|1 g2a b3:|2 g6|]\nAB") == notes("ABcdefg2ab3g6AB")
    assert notes("[|A2 [1B2 ::c2||d2") == notes("A2B2c2d2")


def test_fields_are_read_and_what_is_no_tune_is_named():
    text = "% head\nX: 1\nT:One\nT: Two\nM:6/8 % jig\nL:1/8\nK:D\nABc|\\\nw: la la\ndef\nX:2\nM:C\nK:Hp\nA"
    first, second = _abc.tunes(text)
    assert first.header["T"] == ["One", "Two"] and first.header["M"] == ["6/8"] and first.body == "ABc|\ndef\n"
    with pytest.raises(ValueError, match="no key in 'Hp'"):
        second.notes()
    with pytest.raises(ValueError, match="no unit length in ''"):
        _abc.Tune({"K": ["C"]}, "A").notes()


def test_tokens_are_pitch_and_value_by_turns_and_a_melody_is_the_same_in_every_key():
    tune = np.array(notes("C z2 c3 A5"))
    values = [VALUE + VALUES.index(EIGHTH * n) for n in (1, 2, 3)]
    assert _tokens(tune).tolist() == [
        *(PITCH + 60 - LOWEST, values[0], REST, values[1]),
        *(PITCH + 72 - LOWEST, values[2], PITCH + 69 - LOWEST, OTHER),
    ]
    tune, higher, slower = np.array(notes("CDEF2")), np.array(notes("DEFG2", key="D")), np.array(notes("CDE2F"))
    assert _melody(tune) == _melody(higher) != _melody(slower)


def book(number=40):
    """Tunes in 3/4 of quarters and in 6/8 of eighths, one of them again in another key, one under the same title."""
    rng = np.random.default_rng(0)
    tunes = []
    for i in range(number):
        metre, value = (("3/4", "2"), ("6/8", ""))[i % 2]
        body = "|".join("".join(f"{note}{value}" for note in rng.choice(list("CDEFGAB"), 6)) for _ in range(8))
        tunes.append((f"tune number {i}", metre, "C", body))
    title, metre, _, body = tunes[0]
    tunes.append(("a copy", metre, "G", body.translate(str.maketrans("CDEFGAB", "GABcdef"))))
    tunes.append((title, metre, "G", tunes[2][3][::-1].replace("|", "")))
    tunes.append(("no metre", "none", "C", body + "c"))
    tunes.append(("changing", "3/4\nM:2/4", "C", body + "d"))
    return "\n".join(f"X:{i}\nT:{t}\nM:{m}\nL:1/8\nK:{k}\n{b}\n" for i, (t, m, k, b) in enumerate(tunes))


def test_copies_are_removed_and_tunes_of_one_title_stay_together(tmp_path, own_cache):
    (tmp_path / "book.abc").write_text(book())
    task = AbcMetre(num_notes=20, path=str(tmp_path))
    parts = {split: task.segments(split, 0)[0] for split in SPLITS}
    assert sum(map(len, parts.values())) == 41, "40 and the one of the same title; no copy, no other metres"
    groups = task._data["groups"]
    assert groups[40] == groups[0] and len(set(groups.tolist())) == 40
    assert all(part.inputs.shape[1] == 40 == task.spec.length for part in parts.values())
    floors = task.solvers({split: [part] for split, part in parts.items()})
    assert floors["linear, durations"] == 1.0 > floors["majority"]


def test_bad_values_and_empty_folders_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="num_notes must be 1 or more, got 0"):
        AbcMetre(num_notes=0)
    with pytest.raises(MissingData, match=r"no \.abc files there; type python -m bench\.data fetch folk_tunes"):
        AbcMetre(path=str(tmp_path)).segments("train", 0)


def test_the_packaged_tunes_are_pinned_and_no_variants_cross_the_cut(archive):
    task = AbcMetre()
    parts = [task.segments(split, 0)[0] for split in SPLITS]
    assert [len(part) for part in parts] == [8122, 1159, 2324]
    digest = hashlib.sha256("".join(part.sha256()["inputs"] for part in parts).encode()).hexdigest()
    assert digest[:16] == "74da18349ef596ce", "other tunes or another cut: bump AbcMetre.version"
    stored = task._data
    sides = [set(stored["groups"][stored[split]].tolist()) for split in SPLITS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    whole = [stored["tokens"][start : start + n] for start, n in zip(stored["starts"], stored["lengths"], strict=True)]
    text = ["".join(map(chr, row)) for row in whole]  # in the same key only, a weaker test than the task's own
    side = {int(row): split for split in SPLITS for row in stored[split]}
    some = sorted(side)[::3]
    pairs = _disjoint.text_pairs([text[row] for row in some], 0.7, width=12, normalise=str)
    assert all(side[some[a]] == side[some[b]] for a, b in pairs)
