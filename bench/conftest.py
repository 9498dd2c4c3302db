"""Options of ``pytest bench/``."""

from __future__ import annotations

import pytest

from bench.cases import SETS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which cases, and where."""
    group = parser.getgroup("bench", "operators of nspec")
    group.addoption("--bench-set", choices=SETS, default="quick", help="which of the declared cases (default: quick)")
    group.addoption("--bench-device", default="auto", help="auto, cpu or cuda (default: auto)")
