"""The options of `nspec finetune`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nspec.cli import main
from nspec.run.finetune_config import TuningConfig, load
from nspec.run.yaml import flatten, parse_into, render

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "finetune.yaml"
NO_PEFT = ["tune.methods=[lape, full]"]


def test_the_configuration_that_comes_along_shows_every_option_with_its_default() -> None:
    text = CONFIG.read_text(encoding="utf-8")
    header = text.partition("\n\n# where and on what")[0].splitlines()
    again = render(TuningConfig(), "\n".join(line.removeprefix("#").removeprefix(" ") for line in header))
    assert text == again, "not what render() writes: an option is missing or its comment is old"


def test_what_render_writes_is_read_as_it_was() -> None:
    config = TuningConfig()
    config.text.languages, config.tune.updates, config.run.folder = ["cy", "mt"], 7, "runs/x"
    again = TuningConfig()
    parse_into(again, render(config), "again")
    assert flatten(again) == flatten(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tune.methods=[lape, adapters]", r"tune\.methods: expected methods out of lape.*found 'adapters'"),
        ("tune.methods=[full, full]", r"tune\.methods: full stands in the list more than once"),
        ("text.languages=[cy]", r"text\.languages: lape compares languages and needs two or more"),
        ("text.type=files", r"text\.path: text of type files needs a folder"),
        ("text.type=hub", r"text\.name: text of type hub needs the name"),
        ("neurons.parts=[gate, fc1]", r"neurons\.parts: expected some of gate, up, down, or of fc1, fc2"),
        ("neurons.rate=0", r"neurons\.rate: expected a number in \(0, 1\], found 0\.0"),
        ("neurons.parts=[fc1]", r"neurons\.parts: expected some of gate, up, down of the new model, found \['fc1'\]"),
        ("neurons.rate=1e-9", r"neurons\.rate: 1e-09 of 2048 neurons is less than one"),
        ("model.heads=5", r"model\.d_model: expected a multiple of twice model\.heads"),
        (
            "tune.lr=1",
            r"unknown option tune\.lr in --set; did you mean tune\.lr_neurons or tune\.lr_lora or tune\.lr_full",
        ),
        ("train.lr=1", r"unknown option train\.lr"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(None, [*NO_PEFT, change])


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"text\.path: /no/such is no folder"):
        load(None, [*NO_PEFT, "text.type=files", "text.path=/no/such"])


def test_lora_without_peft_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"lora needs the peft library.*pip install '\.\[tuning\]' in nspec's checkout"
    ):
        load(None)


def test_the_configuration_is_printed_as_that_of_a_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    config = TuningConfig()
    config.tune.methods, config.tune.updates = ["lape", "full"], 9
    assert main(["config", "--finetune", "--set", NO_PEFT[0], "--set", "tune.updates=9"]) == 0
    assert capsys.readouterr().out == render(config)
