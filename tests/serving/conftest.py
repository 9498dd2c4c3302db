"""The tiny models of the tests of specialisation, and the toys of translation, serve here too."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "specialization"), str(TESTS / "mt")]
