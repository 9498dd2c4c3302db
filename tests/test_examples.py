"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_an_own_trainer_goes_from_profile_to_merge(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_trainer.py"))["main"](sentences=16)
    shown = capsys.readouterr().out
    assert "copy: validation loss" in shown
    assert "merged for reverse: " in shown
