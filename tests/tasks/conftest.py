"""A folder of data that is the test's own."""

import pytest
from two_sources import PAIRS, REVIEWS

from tasks import _cache, sources
from tasks._origins import Source


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder of data, without a hub, and the two sources that no hub has."""
    monkeypatch.setenv(_cache.ROOT, str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, origin in (("reviews", REVIEWS), ("pairs", PAIRS)):
        monkeypatch.setitem(sources.SOURCES, name, Source(title="a test", licence="none", origin=origin))
    return tmp_path / "home"
