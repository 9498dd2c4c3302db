"""A pytest plugin for gpu_check.sh: the tests marked ``gpu`` run where pytest-timeout and hypothesis are not installed.

None of them uses either, but pyproject.toml has an option of the first, and the modules import the second. Without
hypothesis, the tests that do use it are skipped with that reason.

    python -m pytest -p bench.gpu.pytest_stand_ins -m gpu tests/kernels/test_compact_ffn.py
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares the option of pytest-timeout, where that does not, so that it is no warning."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "of pytest-timeout, which is not installed: it has no effect")


class _Anything:
    """Stands for every strategy and setting: calls and attributes give another one, a decorated function itself."""

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], FunctionType) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def _given(*_: Any, **__: Any) -> Callable[[Any], Any]:
    def skipped(test: Any) -> Any:
        def replaced() -> None:
            pytest.skip("hypothesis is not installed")

        replaced.__name__, replaced.__doc__ = test.__name__, test.__doc__
        return replaced

    return skipped


if importlib.util.find_spec("hypothesis") is None:
    stand_in: Any = _Module("hypothesis")
    stand_in.given, stand_in.strategies = _given, _Module("hypothesis.strategies")
    sys.modules |= {"hypothesis": stand_in, "hypothesis.strategies": stand_in.strategies}
