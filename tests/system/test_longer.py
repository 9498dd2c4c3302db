"""A finished run that is given more updates ends as one that was asked for them from the start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nspec.files import read_json

ROOT = Path(__file__).resolve().parents[2]

Tiny = Any  # tests/system/conftest.py


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_updates_of_the_dense_model(
    tiny: Tiny, fresh: Tiny, result: Callable[[Tiny], dict[str, Any]]
) -> None:
    command = [sys.executable, "-m", "nspec.cli", "run", str(fresh.config)]
    shorter = subprocess.run(
        [*command, "--set", "train.updates=6"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert shorter.returncode == 0, shorter.stderr
    assert read_json(fresh.folder / "systems/dense/summary.json")["updates"] == 6
    longer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert longer.returncode == 0, longer.stderr
    assert "train: goes on to train.updates = 12" in longer.stderr
    assert "the old results are kept in" in longer.stderr
    for name in ("profile", "masks", "systems/forward", "scores/dense"):
        assert (fresh.folder / f"{name}.old-1").is_dir()
    expected, found = result(tiny), result(fresh)
    for name, value in expected.items():
        if not name.startswith("folders"):
            assert found[name] == value, name
