"""The examples run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_an_own_trainer_goes_from_profile_to_merge(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_trainer.py"))["main"](sentences=16)
    shown = capsys.readouterr().out
    assert "copy: validation loss" in shown
    assert "merged for reverse: " in shown


def test_classes_of_images_go_from_profile_to_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs it")
    figure = tmp_path / "classes.svg"
    runpy.run_path(str(EXAMPLES / "vision_classes.py"))["main"](str(figure), steps=4)
    shown = capsys.readouterr().out
    assert "NeuronMasks(8 tasks, 3 layers" in shown
    assert "specialised, 2 more: " in shown
    assert figure.read_text(encoding="utf-8").count("<image") >= 3  # a panel for each layer


def test_fine_tuned_neurons_gain_in_their_language_and_are_merged(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "finetune_neurons.py"))["main"](sequences=32)
    shown = capsys.readouterr().out
    before, after = map(float, re.findall(r"cy: loss (\S+) of the base, (\S+) now", shown)[0])
    assert after < before - 0.1
    assert re.findall(r"merged: loss (\S+) of cy", shown) == [f"{after:.3f}"]
