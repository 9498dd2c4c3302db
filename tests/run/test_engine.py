"""One engine translates a whole run: the one that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nspec.files import write_json
from nspec.mt.scoring.engine import CTRANSLATE2, TRANSFORMERS
from nspec.run.config import Config
from nspec.run.engine import choose_engine, recorded_engine

pytest.importorskip("ctranslate2")

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    found = Config()
    found.run.folder = str(tmp_path)
    return found


def translated(config: Config, system: str, **engine: Any) -> None:
    folder = Path(config.run.folder) / "scores" / system
    write_json(folder / "en-de.decode.json", {"sentences": 2, "seconds": 1.0, **engine})


def test_a_new_run_takes_ctranslate2_where_every_system_can_be_converted(config: Config) -> None:
    assert choose_engine(config, CPU).name == CTRANSLATE2
    write_json(Path(config.run.folder) / "systems/dense/model/config.json", {"model_type": "m2m_100"})
    assert choose_engine(config, CPU).reason.startswith("the activation None is not converted; ")
    config.run.systems = ["dense", "adapters"]
    chosen = choose_engine(config, CPU)
    assert chosen.name == TRANSFORMERS
    assert chosen.reason.startswith("the system adapters cannot be converted")
    config.decode.engine = CTRANSLATE2
    with pytest.raises(ValueError, match="decode.engine is ctranslate2, which cannot be: the system adapters"):
        choose_engine(config, CPU)


def test_a_pretrained_model_that_is_not_converted_is_known_before_it_is_trained(config: Config, tmp_path: Path) -> None:
    write_json(tmp_path / "own/config.json", {"model_type": "marian", "activation_function": "mish"})
    config.model.pretrained = str(tmp_path / "own")
    assert choose_engine(config, CPU).reason.startswith("the activation mish is not converted")


def test_a_run_goes_on_with_the_engine_that_it_has(config: Config) -> None:
    translated(config, "forward")  # as older versions wrote it
    assert choose_engine(config, CPU).name == TRANSFORMERS
    translated(config, "forward", engine=CTRANSLATE2)
    assert choose_engine(config, CPU).reason == "the translations of forward were made by it"
    assert recorded_engine(config, ["evaluate:forward"]) == ("", "")
    config.run.systems = ["dense", "forward", "adapters"]
    with pytest.raises(ValueError, match=r"of forward were made by ctranslate2, .* cannot go on: the system adapters"):
        choose_engine(config, CPU)
    (Path(config.run.folder) / "scores/forward/en-de.decode.json").write_text("{")  # is translated again
    assert recorded_engine(config) == ("", "")


@pytest.mark.parametrize(("there", "asked"), [(CTRANSLATE2, TRANSFORMERS), (TRANSFORMERS, CTRANSLATE2)])
def test_another_engine_than_that_of_the_run_is_an_error(config: Config, there: str, asked: str) -> None:
    translated(config, "dense", engine=there)
    config.decode.engine = asked
    with pytest.raises(
        ValueError, match=f"is {asked}, but the translations of dense were made by {there}.*--redo evaluate"
    ):
        choose_engine(config, CPU)
    config.decode.engine = there
    assert choose_engine(config, CPU).name == there


def test_two_engines_in_one_run_are_an_error(config: Config) -> None:
    translated(config, "dense", engine=CTRANSLATE2)
    translated(config, "forward")
    with pytest.raises(ValueError, match="those of dense by ctranslate2 and those of forward by transformers; --redo"):
        recorded_engine(config)
