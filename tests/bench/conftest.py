"""The broken mechanisms are importable here as they are in the runner's children."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
