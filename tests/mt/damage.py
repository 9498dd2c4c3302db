"""Damage to the files of a training, and a training that has some of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_translation import Toy

from nspec.mt.training import checkpoints
from nspec.mt.training import train as training


def damaged_copy(toy: Toy, name: str) -> Path:
    """A training that was stopped at its third validation, so that it has checkpoints of updates 4 and 8."""
    folder = toy.folder / name
    stopped = toy.folder / "stopped at three"
    if not stopped.exists():
        measure, calls = training.Validator.measure, iter(range(9))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                training.Validator, "measure", lambda self: interrupt() if next(calls) == 2 else measure(self)
            )
            with pytest.raises(KeyboardInterrupt):
                toy.train("stopped at three", mode="forward")
    shutil.copytree(stopped, folder)
    assert [path.name for path in checkpoints.whole(folder / "checkpoints")] == ["checkpoint-4", "checkpoint-8"]
    return folder


def interrupt() -> Any:
    raise KeyboardInterrupt


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
