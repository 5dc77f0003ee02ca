"""Tunes in ABC notation: their header, and their notes as pitches and durations that know of no bar line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WHOLE = 384  # ticks of a whole note: a triplet of 128th notes is whole numbers
REST = -1
STEPS = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))
SHARPS = "FCGDAEB"
MODES = {"maj": 0, "ion": 0, "mix": -1, "dor": -2, "m": -3, "min": -3, "aeo": -3, "phr": -4, "loc": -5, "lyd": 1}

_TOKEN = re.compile(
    r"""\((?P<tuplet>[2-9])(?::(?P<into>\d*))?(?::(?P<over>\d*))?
    | (?P<accidental>\^{1,2}|_{1,2}|=)?(?P<note>[A-Ga-gzx])(?P<octave>[,']*)(?P<times>\d*)(?P<slashes>/*)(?P<by>\d*)
    | (?P<broken>>+|<+)
    | (?P<tie>-)
    | (?P<bar>(?:\[?\|[\]\d|:]*|:+)\d?|\[\d)
    """,
    re.VERBOSE,
)
_NOTE = r"[\^_=]*[A-Ga-g][,']*\d*/*\d*"
_NOISE = re.compile(r'"[^"]*"|![^!\n]*!|\+[^+\n]*\+|\{[^}]*\}|%[^\n]*|\[[A-Za-z]:[^\]]*\]')
_TUPLETS = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}  # notes in the time of so many; the others: 2


@dataclass
class Tune:
    """A tune as it stands in the file.

    Attributes:
        header: letter of a field -> its values in order, such as "T" -> titles.
        body: the lines of music.
    """

    header: dict[str, list[str]] = field(default_factory=dict)
    body: str = ""

    def notes(self) -> list[tuple[int, int]]:
        """(MIDI pitch or REST, ticks) of every note as written out once, chords by their first note.

        Accidentals hold to the end of their bar; tied notes are one, and so are rests in a row. Grace notes, ornaments
        and texts are left out.

        Raises:
            ValueError: no key or unit length that can be read.
        """
        key = _signature(self.header.get("K", [""])[0])
        found: list[tuple[int, int]] = []
        changed: dict[str, int] = {}  # letter with octave -> accidental in this bar
        unit, tied, broken = self._unit(), False, 0
        tuplet, left = 1.0, 0
        for token in _TOKEN.finditer(re.sub(rf"\[({_NOTE})(?:{_NOTE})*\]", r"\1", _NOISE.sub("", self.body))):
            if token["bar"]:
                changed = {}
            elif token["tie"]:
                tied = True
            elif token["broken"]:
                broken = len(token["broken"]) * (1 if token["broken"][0] == ">" else -1)
                if found:
                    pitch, ticks = found[-1]
                    found[-1] = pitch, round(ticks * _stretched(broken))
            elif token["tuplet"]:
                count = int(token["tuplet"])
                tuplet = int(token["into"] or _TUPLETS.get(count, 2)) / count
                left = int(token["over"] or count)
            else:
                length = int(token["times"] or 1) / (int(token["by"] or 2 ** len(token["slashes"])) or 1)
                ticks = round(unit * length * (tuplet if left else 1) * _stretched(-broken))
                left, broken = max(0, left - 1), 0
                pitch = _pitch(token["note"], token["octave"], token["accidental"], key, changed)
                if found and pitch == found[-1][0] and (tied or pitch == REST):
                    found[-1] = pitch, found[-1][1] + ticks
                else:
                    found.append((pitch, ticks))
                tied = False
        return found

    def _unit(self) -> int:
        text = self.header.get("L", [""])[0]
        if match := re.match(r"1/(1|2|4|8|16|32|64)\b", text):
            return WHOLE // int(match[1])
        raise ValueError(f"no unit length in {text!r}")


def tunes(text: str) -> Iterator[Tune]:
    """The tunes of a file; each begins with the field X."""
    for part in re.split(r"(?m)^X:", text)[1:]:
        tune, lines = Tune(), []
        for line in part.split("\n")[1:]:
            if match := re.match(r"([A-Za-z]):(?![|:\]])\s*(.*?)\s*(?:%.*)?$", line):
                tune.header.setdefault(match[1], []).append(match[2])
            elif not line.startswith("%"):
                lines.append(line.rstrip("\\\r "))
        tune.body = "\n".join(lines)
        yield tune


def _signature(key: str) -> dict[str, int]:
    """Letter -> 1 (sharp) or -1 (flat) of a key such as Bb, Em or A Mixolydian."""
    match = re.match(r"([A-G])([#b]?)\s*([A-Za-z]*)", key)
    if not match:
        raise ValueError(f"no key in {key!r}")
    mode = match[3].lower()
    shift = MODES.get("m" if mode == "m" else mode[:3], 0)
    fifths = SHARPS.index(match[1]) - 1 + 7 * {"#": 1, "b": -1, "": 0}[match[2]] + shift
    letters = SHARPS[:fifths] if fifths > 0 else SHARPS[fifths:] if fifths < 0 else ""
    return dict.fromkeys(letters, 1 if fifths > 0 else -1)


def _pitch(note: str, octave: str, accidental: str | None, key: dict[str, int], changed: dict[str, int]) -> int:
    """MIDI pitch, 60 for C; an accidental is remembered in `changed`."""
    if note in "zx":
        return REST
    height = octave.count("'") - octave.count(",") + note.islower()
    place = f"{note.upper()}{height}"
    if accidental:
        changed[place] = accidental.count("^") - accidental.count("_")
    return 60 + 12 * height + STEPS[note.upper()] + changed.get(place, key.get(note.upper(), 0))


def _stretched(broken: int) -> float:
    """Factor of the note before a mark > (1), >> (2), < (-1) or none (0)."""
    short = 0.5 ** abs(broken)
    return 2 - short if broken > 0 else short
