"""The examples run as they stand, and there is a test of each."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def main(name: str) -> Any:
    """The function ``main`` of an example."""
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_a_model_of_one_s_own_goes_from_profile_to_merge(capsys: pytest.CaptureFixture[str]) -> None:
    main("own_model.py")(steps=20)
    shown = capsys.readouterr().out
    assert shown.count("mean squared error of the merged model") == 3
    assert "de and nl share" in shown


def test_a_mixed_batch_gives_what_a_batch_for_each_task_gives(capsys: pytest.CaptureFixture[str]) -> None:
    main("mixed_batches.py")()
    differences = [float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(differences) == 5
    assert max(differences) < 1e-9


def test_a_masked_layer_trains_the_neurons_of_its_mask_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main("masked_linear.py")(steps=10)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("neurons:"))
    may, have = (int(part.split()[0]) for part in said.removeprefix("neurons: ").split(", ")[:2])
    assert 0 < have <= may
    assert said.endswith("others 0")


def test_an_own_trainer_goes_from_profile_to_merge(capsys: pytest.CaptureFixture[str]) -> None:
    main("own_trainer.py")(sentences=16)
    shown = capsys.readouterr().out
    assert "copy: validation loss" in shown
    assert "merged for reverse: " in shown


def test_own_text_goes_from_files_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("own_text.py")(str(tmp_path), sentences=60)
    assert "NeuronMasks(4 tasks, 2 layers" in capsys.readouterr().out
    assert (tmp_path / "run" / "report" / "index.html").is_file()


def test_a_merged_model_serves_what_the_masks_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("serving.py")(str(tmp_path))
    shown = capsys.readouterr().out
    assert "the same tokens as with masks" in shown
    assert re.search(r"as exported, with (\d+) of 128 neurons in a layer of the encoder: the same tokens", shown)
    assert "a batch of 2 directions: [16, " in shown


def test_classes_of_images_go_from_profile_to_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs it")
    figure = tmp_path / "classes.svg"
    main("vision_classes.py")(str(figure), steps=4)
    shown = capsys.readouterr().out
    assert "NeuronMasks(8 tasks, 3 layers" in shown
    assert "specialised, 2 more: " in shown
    assert figure.read_text(encoding="utf-8").count("<image") >= 3  # a panel for each layer


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested]


def test_fine_tuned_neurons_gain_in_their_language_and_are_merged(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "finetune_neurons.py"))["main"](sequences=32)
    shown = capsys.readouterr().out
    before, after = map(float, re.findall(r"cy: loss (\S+) of the base, (\S+) now", shown)[0])
    assert after < before - 0.1
    assert re.findall(r"merged: loss (\S+) of cy", shown) == [f"{after:.3f}"]
