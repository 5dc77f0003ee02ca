"""Real data for tests: fetched on first use, or the test is skipped with the reason."""

from pathlib import Path

import pytest

from tasks import sources


def fetched(name: str) -> Path:
    """The archive of a source."""
    try:
        return sources.fetch(name)
    except sources.MissingData as error:
        pytest.skip(f"the source cannot be had: {error}")
