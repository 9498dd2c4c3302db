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

# One process, as most of the time would go into imports.
PROGRAM = """
import sys
from nspec.cli import main
config, longer, straight = sys.argv[1:]
few = ["run", config, "--set", "run.systems=[dense,forward]", "--set", "run.folder=" + longer]
assert main([*few, "--set", "train.updates=6"]) == 0
print("now for longer", file=sys.stderr)
assert main(few) == 0
assert main([*few, "--set", "run.folder=" + straight]) == 0
"""


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_updates_of_the_dense_model(
    fresh: Tiny, tmp_path: Path, result: Callable[[Path], dict[str, Any]]
) -> None:
    longer, straight = tmp_path / "longer", tmp_path / "straight"
    command = [sys.executable, "-c", PROGRAM, str(fresh.config), str(longer), str(straight)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=290)
    assert done.returncode == 0, done.stderr
    said = done.stderr.partition("now for longer")[2]
    assert "train: goes on to train.updates = 12" in said
    assert "the old results are kept in" in said
    assert read_json(longer / "systems/dense/summary.json")["updates"] == 12
    for name in ("profile", "masks", "systems/forward", "scores/dense"):
        assert (longer / f"{name}.old-1").is_dir()
    expected, found = result(straight), result(longer)
    assert {name.partition(" ")[0] for name in expected} >= {"dense", "forward", "profile/counts.safetensors"}
    for name, value in expected.items():
        if not name.startswith("folders"):
            assert found[name] == value, name
