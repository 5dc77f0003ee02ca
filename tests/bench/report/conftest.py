"""Every test of the report draws in the report's style."""

from __future__ import annotations

import matplotlib.style
import pytest
import sliced

from bench.report import figure
from bench.report.leaderboard import boards


@pytest.fixture(autouse=True)
def style():
    with matplotlib.style.context(["default", figure.STYLE]):
        yield


@pytest.fixture(scope="session")
def found():
    """The boards of `sliced.ALL` by name."""
    return {name: boards(data())[0] for name, data in sliced.ALL.items()}
