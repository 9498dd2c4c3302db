"""The tiny models of the tests of specialisation serve here too."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "specialization")]
