"""Leaves a file behind when it is imported: it must not be, unless plugins=[faulty_plugin] says so."""

import os
from pathlib import Path

Path(os.environ["MARKER"]).touch()


class Marker:
    """Stands for foreign code."""
