"""Let the tests import their vocabulary, tests/testing.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
