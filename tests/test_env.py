"""What ``nspec env`` knows of the machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nspec
from nspec import env
from nspec.kernels.common.backend import OPERATORS


def test_every_operator_has_a_backend_and_a_reason() -> None:
    rows = env.operators()
    assert [row[0] for row in rows][: 2 * len(OPERATORS)] == [
        f"{name}, cpu, {dtype}" for dtype in ("float32", "bfloat16") for name in OPERATORS
    ]
    assert all(backend and reason for _, backend, reason in rows)


def test_a_forced_backend_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSPEC_BACKEND", "reference")
    assert {backend for _, backend, _ in env.operators()} == {"reference"}
    assert ("NSPEC_BACKEND", "reference") in env.system()


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    shown = dict(env.packages())
    assert shown["torch"].startswith("2.")
    assert shown["no-such-package"] == "not installed"


def test_it_runs_as_a_module() -> None:
    root = Path(nspec.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "nspec.env"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"nspec +{re.escape(nspec.__version__)} in {re.escape(str(root / 'nspec'))}", done.stdout)
