"""Which command a configuration is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from nspec.cli import main
from nspec.run.finetune_config import TuningConfig, load
from nspec.run.kinds import command_of
from nspec.run.yaml import find_config, parse_into


def test_a_configuration_of_fine_tuning_is_printed_by_its_name_alone(capsys: pytest.CaptureFixture[str]) -> None:
    change = ["tune.methods=[lape, full]", "tune.updates=9"]
    assert main(["config", "finetune", *(part for one in change for part in ("--set", one))]) == 0
    printed = TuningConfig()
    parse_into(printed, capsys.readouterr().out, "printed")
    assert printed == load(find_config("finetune"), change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "finetune"],
            "finetune is a configuration of `nspec finetune`, by its sections text, neurons, tune: start it with `nspec "
            "finetune finetune`",
        ),
        (["train", "finetune"], "start it with `nspec finetune finetune`"),
        (["run", "finetune", "--seeds", "1,2"], "start it with `nspec finetune finetune`"),
        (["finetune", "multi30k"], "multi30k is a configuration of `nspec run`, by its sections corpus, "),
        (["config", "cldr8", "--finetune"], "cldr8 is a configuration of `nspec run`"),
    ],
)
def test_the_other_command_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_file_that_does_not_tell_is_left_to_the_command(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    for text in ("run: {seed: 2}\nmodel: {layers: 3}\n", "- a list\n", "a: [b\n", "", "tune:\ntrain:\n"):
        path.write_text(text)
        assert command_of(path) is None
    path.write_text("tune:\ntrian:\n")  # a section that is neither's has the command say so
    assert command_of(path) == "finetune"
