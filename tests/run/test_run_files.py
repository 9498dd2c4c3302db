"""Readers of a run folder take its files only as the run wrote them, and one error says which are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nspec import cli_tools
from nspec.files import sha256, write_json, write_text
from nspec.run.checks import load
from nspec.run.config import Config
from nspec.run.folder import Run
from nspec.run.read import check_written, read_config
from nspec.run.stages import Stage
from nspec.run.yaml import flatten, render, render_complete


def made(run: Path, header: bool = True, record: bool = True) -> Config:
    """A run folder with a configuration that differs from the defaults, and the record of a step."""
    config = Config()
    config.run.folder, config.corpus.pivot, config.decode.beam, config.score.baseline = str(run), "de", 3, "dense"
    write_text(run / "config.yaml", render_complete(config) if header else render(config))
    known = {name: value for name, value in flatten(config).items() if name.startswith(("corpus.", "decode."))}
    if record:
        write_json(run / "scores/dense/stage.json", {"options": known | {"decode.of_a_later_version": 1}})
    return config


@pytest.mark.parametrize("header", [True, False])
def test_a_whole_configuration_is_read(tmp_path: Path, header: bool) -> None:
    config = made(tmp_path, header)
    assert read_config(tmp_path) == (config, (tmp_path / "config.yaml").read_text())


def test_a_configuration_cut_off_anywhere_is_damaged_and_not_the_defaults(tmp_path: Path) -> None:
    made(tmp_path, record=False)
    path = tmp_path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if line.startswith("  ") and "#" not in line)
    for length in [0, *range(1, last, 7), last]:
        path.write_text("".join(lines[:length]))
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is damaged: it .* write it anew with "):
            read_config(tmp_path)
        if length:  # the chain takes it for a configuration of its own
            with pytest.raises(ValueError, match=r"is damaged: it says that it holds \d+ options and has \d+;"):
                load(path)
    path.write_text("".join(lines).rstrip("se\n"))
    with pytest.raises(ValueError, match=r"options and ends within a line;"):
        read_config(tmp_path)


def test_an_older_configuration_lacks_no_option_that_the_run_was_made_with(tmp_path: Path) -> None:
    made(tmp_path, header=False)
    path = tmp_path / "config.yaml"
    text = path.read_text()
    path.write_text(text[: text.index("  repetition_penalty: ")])
    with pytest.raises(
        ValueError, match=r"config\.yaml is damaged: it lacks decode\.batch_tokens, with which the run was"
    ):
        read_config(tmp_path)
    # The records do not name it: it may be of a later version than the run.
    path.write_text("".join(line for line in text.splitlines(keepends=True) if "  max_positions:" not in line))
    assert read_config(tmp_path)[0].model.max_positions == Config().model.max_positions


FILES = ["model.safetensors", "tokenizer.json", "nspec.json", "masks/masks.safetensors", "config.json"]


def trained(run: Path) -> Path:
    """A run with two systems, one of a model for each direction; their models are no models."""
    config = made(run)
    config.run.systems = ["dense", "forward", "finetuned"]
    write_text(run / "config.yaml", render_complete(config))
    for system, models in {"forward": ["model"], "finetuned": ["en-de/model", "de-en/model"]}.items():
        folder = run / "systems" / system
        for file in (folder / model / name for model in models for name in FILES):
            write_text(file, f"content of {file.name}")
        stage = Stage("any", f"systems/{system}", outputs=("model/**/*", "*/model/**/*"))
        outputs = Run(config, [stage])._outputs(stage)
        assert len(outputs) == len(models) * len(FILES)
        write_json(
            folder / "stage.json", {"stage": "any", "options": {}, "inputs": {}, "seconds": 1, "outputs": outputs}
        )
    return run


@pytest.mark.parametrize(("system", "model"), [("forward", "model"), ("finetuned", "en-de/model")])
@pytest.mark.parametrize("name", FILES)
def test_translating_with_a_run_takes_a_model_only_as_the_run_wrote_it(
    tmp_path: Path, system: str, model: str, name: str
) -> None:
    run = trained(tmp_path)
    folder = run / "systems" / system / model
    assert cli_tools._model_folder("", str(run), system, "en-de")[0] == folder
    before = (folder / name).read_text()
    for content, state in {before + " ": "has changed since", "": "is empty, and was not", None: "is gone"}.items():
        (folder / name).unlink() if content is None else (folder / name).write_text(content)
        expected = rf"^{re.escape(str(folder / name))} {state}.*--redo specialize:{system}; --model .* as it is$"
        with pytest.raises(ValueError, match=expected):
            cli_tools._model_folder("", str(run), system, "en-de")
        assert cli_tools._model_folder(str(folder), "", "", "en-de")[0] == folder


def test_large_files_are_compared_by_size_and_other_steps_not_at_all(tmp_path: Path) -> None:
    record, path = tmp_path / "stage.json", tmp_path / "model" / "big"
    write_text(path, "12345")
    check_written(path, record, "")  # no record
    outputs = {"model/big": 5, "model2/gone": 1, "gone": 1}
    write_json(record, {"outputs": outputs})
    check_written(path, record, "")
    check_written(path.parent, record, "")
    write_text(path, "123456")
    with pytest.raises(ValueError, match=r"big has changed since it was written: mend it"):
        check_written(path.parent, record, "mend it")
    write_json(record, {"outputs": outputs | {"model/big": sha256(path)}})
    check_written(path.parent, record, "")
