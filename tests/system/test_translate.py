"""``nspec translate``: one line for one line, as they come, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nspec import NeuronMasks, cli
from nspec.mt.scoring.config import DecodeConfig
from tests.system.own_lines import own_lines

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
    assert own_lines(errors.decode()) == ""
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
    record = json.loads((tmp_path / "run/masks/stage.json").read_text())
    (tmp_path / "run/masks/stage.json").write_text(json.dumps(record | {"outputs": {}}))  # as older versions left it
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


def translated(tiny: Tiny, *arguments: object) -> int:
    """The exit status of the dense system's translation, greedy."""
    model = ["--task", "de-en", "--model", tiny.folder / "systems/dense/model", "--beam", "1", "--threads", "1"]
    return cli.main(["translate", *map(str, [*model, *arguments])])


def test_a_byte_order_mark_is_no_text(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{line}\n" for line in sources(tiny)[:2])
    (tmp_path / "plain").write_text(text, encoding="utf-8")
    (tmp_path / "marked").write_text(text, encoding="utf-8-sig")
    for name in ("plain", "marked"):
        assert translated(tiny, "--input", tmp_path / name, "--output", tmp_path / f"{name}.out") == 0
    with open(tmp_path / "marked", encoding="utf-8") as marked:
        monkeypatch.setattr(sys, "stdin", marked)
        assert translated(tiny, "--output", tmp_path / "stdin.out") == 0
    expected = (tmp_path / "plain.out").read_bytes()
    assert (tmp_path / "marked.out").read_bytes() == (tmp_path / "stdin.out").read_bytes() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-length-ratio", "inf"], "decode.max_length_ratio: expected a finite number, found inf"),
        (["--max-length-ratio", "nan"], "decode.max_length_ratio: expected a finite number, found nan"),
        (["--length-penalty", "nan"], "decode.length_penalty: expected a finite number, found nan"),
        (["--length-penalty", "1e308"], "decode.length_penalty: expected at most 10, found 1e+308"),
        (["--beam", "1000000"], "decode.beam: expected at most 1000, found 1000000"),
        (["--no-repeat-ngram-size", "-1"], "decode.no_repeat_ngram_size: expected at least 0, found -1"),
        (["--repetition-penalty", "0"], "decode.repetition_penalty: expected a number in (0, 100], found 0.0"),
        (["--beam", "900"], "a beam of 900 needs a vocabulary of at least 1800"),
        (["--output", "nowhere/x"], "--output nowhere/x: there is no folder "),
        (["--output", "/"], "--output / is a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_translated(
    tiny: Tiny, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.folder / "systems/dense/model"
    assert refused(capsys, "translate", "--task", "de-en", "--model", model, *arguments).startswith(message)


def test_every_option_of_the_search_reaches_it(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nspec.mt.scoring import translate

    seen: list[Any] = []
    searched = lambda _, sources, limits, decode, special: seen.append(decode) or [[] for _ in sources]
    monkeypatch.setattr(translate.TransformersSearch, "__call__", searched)
    (tmp_path / "in").write_text("eins\n")
    given = ["--length-penalty", "0.5", "--max-length-ratio", "3", "--no-repeat-ngram-size", "4"]
    given += ["--repetition-penalty", "1.5", "--batch-tokens", "99", "--beam", "7", "--engine", "transformers"]
    assert translated(tiny, "--input", tmp_path / "in", "--output", tmp_path / "out", *given) == 0
    assert seen == [DecodeConfig("transformers", 7, 0.5, 3.0, 4, 1.5, 99)]
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(DecodeConfig)}
    assert {name.removeprefix("--") for name in given[::2]} == fields


def test_a_masked_system_without_what_makes_it_is_not_translated_as_the_dense_one(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny.folder / "systems", run / "systems")
    shutil.copy(tiny.folder / "config.yaml", run)
    (run / "systems/forward/model/nspec.json").unlink()
    arguments = ["translate", "--task", "de-en", "--run", run]
    assert "nspec.json is gone: put it back as it was" in refused(capsys, *arguments, "--system", "forward")
    (run / "systems/forward/stage.json").unlink()  # as in a run of an older version
    assert "nspec.json is not there, but masks/ is" in refused(capsys, *arguments, "--system", "forward")
    shutil.rmtree(run / "systems/forward/model/masks")
    message = refused(capsys, *arguments, "--system", "forward")
    assert (
        "is a dense model (nspec.json is not there), but config.yaml of the run says masks in mode forward" in message
    )
    (run / "systems/forward").rename(run / "systems/old")
    assert "config.yaml does not say what it is" in refused(capsys, *arguments, "--system", "old")


def test_a_pipe_gets_each_line_as_it_is_there(tiny: Tiny, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "nspec.cli", "translate", "--task", "de-en", "--beam", "1", "--output", str(pipe)]
    command += ["--model", str(tiny.folder / "systems/dense/model")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    try:
        with open(pipe, "rb") as reader:
            process.stdin.write(f"{sources(tiny)[0]}\n".encode())
            process.stdin.flush()
            assert reader.readline().endswith(b"\n")
            process.stdin.close()
            assert reader.read() == b""
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/full"])
def test_a_device_is_written_to(tiny: Tiny, tmp_path: Path, path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"there is no {path}")
    (tmp_path / "in").write_text("eins\n")
    command = [sys.executable, "-m", "nspec.cli", "translate", "--task", "de-en", "--beam", "1", "--output", path]
    command += ["--model", str(tiny.folder / "systems/dense/model"), "--input", str(tmp_path / "in")]
    with open(tmp_path / "out", "wb") as out:
        out.write(b"before\n")
        out.flush()
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, cwd=ROOT, timeout=120, text=True)
    written = (tmp_path / "out").read_bytes()
    if path == "/dev/stdout":
        assert (done.returncode, own_lines(done.stderr)) == (0, "")
        assert written.startswith(b"before\n")
        assert written.count(b"\n") == 2
    else:
        assert done.returncode == 2
        assert own_lines(done.stderr) == f"nspec: error: [Errno 28] cannot write {path}: No space left on device\n"
        assert written == b"before\n"
