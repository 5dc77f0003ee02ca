"""Errors are part of the interface: one line that says what is wrong, the nearest valid value, what to type."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable

USAGE_EXIT = 2


class UserError(Exception):
    """A user's mistake; shown as its one line, without a traceback."""


class ImpossibleCell(UserError):
    """The settings of one cell of a sweep have no data or no network; other cells may run."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The valid names closest to `name`, best first; never empty when `valid` is not."""
    valid = sorted(set(valid))
    close = [other for other in valid if sorted(other) == sorted(name)]  # difflib overlooks swapped letters: 2s for s2
    close += [other for other in difflib.get_close_matches(name, valid, n=count, cutoff=0.6) if other not in close]
    close += [other for other in valid if other not in close and (name in other or other in name)]
    for most, cutoff in ((count, 0.5), (1, 0.0)):  # one wrong letter of two is a half
        close = close or difflib.get_close_matches(name, valid, n=most, cutoff=cutoff)
    return close[:count] or valid[:1]


def unknown(kind: str, name: str, valid: Iterable[str], advice: str = "") -> UserError:
    """'unknown attention "sofmax"; nearest: softmax. ...'"""
    valid = list(valid)
    near = f"; nearest: {', '.join(nearest(name, valid))}" if valid else ""
    return UserError(f'unknown {kind} "{name}"{near}{". " + advice if advice else ""}')


def run(main: Callable[[], int | None]) -> None:
    """Run a command: a user's mistake becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USAGE_EXIT)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        sys.exit(0)
