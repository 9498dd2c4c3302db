"""``nspec translate``: one line for one line, as they come, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nspec import NeuronMasks, cli

ROOT = Path(__file__).resolve().parents[2]

Tiny = Any  # tests/system/conftest.py


def sources(tiny: Tiny) -> list[str]:
    return (tiny.folder / "prepared/text/test/de-en.de.txt").read_text().splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("nspec: error: ")
    return line.removeprefix("nspec: error: ")


@pytest.mark.parametrize("system", ["dense", "forward"])
def test_a_file_gives_what_the_evaluation_gave(tiny: Tiny, tmp_path: Path, system: str) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("\n".join(sources(tiny)), encoding="utf-8")  # the last line has no end
    arguments = ["--run", tiny.folder, "--system", system, "--task", "de-en", "--input", source, "--output", output]
    assert cli.main(["translate", "--threads", "1", *map(str, arguments)]) == 0
    assert output.read_bytes() == (tiny.folder / f"scores/{system}/de-en.hyp.txt").read_bytes()


def test_standard_input_is_answered_line_by_line(tiny: Tiny) -> None:
    command = [sys.executable, "-m", "nspec.cli", "translate", "--task", "de-en", "--beam", "1"]
    command += ["--model", str(tiny.folder / "systems/forward/model")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    try:
        for line in [*sources(tiny)[:2], "", "  ", "letzte\r"]:  # each only after the answer to the one before
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            answers.append(process.stdout.readline())
        process.stdin.write(b"ohne Ende")
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert errors == b""
    assert all(answer.endswith(b"\n") for answer in answers)
    assert answers[2:4] == [b"\n", b"\n"]
    assert rest.count(b"\n") == 1


def test_a_line_that_is_not_utf8_is_named(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_bytes(b"gut\nCaf\xe9\n")
    arguments = ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt"]
    model = tiny.folder / "systems/dense/model"
    message = refused(capsys, "translate", "--task", "de-en", "--model", model, *arguments)
    assert message == f"{tmp_path / 'in.txt'} line 2 is not UTF-8: byte 4 is 0xe9"
    assert os.listdir(tmp_path) == ["in.txt"], "no half of a translation"


def test_a_direction_without_masks_is_refused(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.folder / "systems/forward/model"
    message = refused(capsys, "translate", "--task", "de-fr", "--model", model)
    assert "de-fr" in message
    assert "en-de" in message, "it says which ones there are"


def test_a_language_that_a_dense_model_does_not_know_is_refused(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fr" in refused(capsys, "translate", "--task", "de-fr", "--model", tiny.folder / "systems/dense/model")
    assert "en_de" in refused(capsys, "translate", "--task", "en_de", "--model", tiny.folder / "systems/dense/model")


def test_a_system_that_is_not_there_is_refused_with_those_that_are(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "translate", "--task", "de-en", "--run", tiny.folder, "--system", "lass")
    assert message.endswith("has the trained systems continued, dense, forward, random, update")


@pytest.mark.parametrize("change", ["d_ff", "layer names"])
def test_masks_of_another_model_are_refused(
    tiny: Tiny, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny.folder / "systems/forward/model", tmp_path / "model")
    masks = NeuronMasks.load(tmp_path / "model/masks")
    layers = {layer: layer if change == "d_ff" else layer.replace("model.", "transformer.") for layer in masks.layers}
    width = 128 if change == "d_ff" else 64
    shutil.rmtree(tmp_path / "model/masks")
    other = {task: {name: torch.ones(width, dtype=torch.bool) for name in layers.values()} for task in masks.tasks}
    NeuronMasks(other).save(tmp_path / "model/masks")
    message = refused(capsys, "translate", "--task", "de-en", "--model", tmp_path / "model")
    assert ("128" in message and "64" in message) if change == "d_ff" else "transformer.encoder" in message


def test_masks_without_a_direction_do_not_train(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny.folder, tmp_path / "run")
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny.config.read_text().replace(str(tiny.folder), str(tmp_path / "run")))
    for folder in [
        "masks/masks.json",
        "masks/masks.safetensors",
        "systems/forward",
        "systems/update",
        "systems/random",
    ]:
        path = tmp_path / "run" / folder
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    masks = NeuronMasks.load(tiny.folder / "masks")
    NeuronMasks({"en-de": masks["en-de"]}).save(tmp_path / "run/masks")
    for folder in ["random_masks", "scores/forward", "scores/update", "scores/random"]:
        shutil.rmtree(tmp_path / "run" / folder)
    capsys.readouterr()
    assert cli.main(["specialize", str(config), "--system", "forward"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("nspec: error: no masks for de-en; there are masks for en-de")
    assert "Traceback" not in error


def test_nothing_to_translate_is_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.txt"
    arguments = ["--task", "de-en", "--model", str(tiny.folder / "systems/dense/model"), "--output", str(output)]
    with open(os.devnull, encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert cli.main(["translate", *arguments]) == 0
    assert output.read_bytes() == b""
