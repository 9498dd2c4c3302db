"""What is declared of a run, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from nspec.files import read_json, write_json, write_text
from nspec.run.checks import load
from nspec.run.config import Config
from nspec.run.protocol import Primary, declarations, declare, primary_of


def config_of(hypothesis: str = "", primary: str = "") -> Config:
    config = Config()
    config.run.hypothesis, config.run.primary = hypothesis, primary
    return config


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("forward", Primary("forward", "loss", "all")),
        ("update chrf", Primary("update", "chrf", "all")),
        ("dense bleu level:low/from_en", Primary("dense", "bleu", "level:low/from_en")),
    ],
)
def test_the_declared_comparison_is_system_metric_and_average(text: str, found: Primary | None) -> None:
    assert primary_of(config_of(primary=text)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward rouge", "a metric of loss, bleu, chrf"),
        ("forward loss some", "an average such as all"),
        ("forward loss all more", "expected SYSTEM METRIC AVERAGE"),
        ("lass loss", "expected one of dense, forward, update, random, .*found 'lass'"),
        ("continued loss", "found 'continued'"),
    ],
)
def test_what_cannot_be_compared_is_an_error_before_the_run(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"run.primary: .*{message}"):
        load(None, [f"run.primary={text}"])


def test_the_dense_model_of_a_declared_run_is_trained_with_its_configuration() -> None:
    alone = load(None, ["run.systems=[dense]", "run.primary=forward loss"])
    assert primary_of(alone) is None  # nothing is compared yet


def test_a_declaration_says_which_scores_were_there(tmp_path: Path) -> None:
    declare(tmp_path, config_of())
    assert declarations(tmp_path) == []
    declare(tmp_path, config_of("It helps.", "forward loss"))
    write_text(tmp_path / "scores" / "forward" / "scores.json", "{}")
    declare(tmp_path, config_of("It helps.", "forward loss"))  # started again
    declare(tmp_path, config_of("It helps from English.", "forward loss from_en"))
    first, second = declarations(tmp_path)
    assert (first["hypothesis"], first["primary"], first["scored"]) == ("It helps.", "forward loss", [])
    assert (second["hypothesis"], second["scored"]) == ("It helps from English.", ["forward"])


def test_a_broken_note_is_named(tmp_path: Path) -> None:
    declare(tmp_path, config_of("It helps."))
    noted = read_json(tmp_path / "protocol.json")
    del noted[0]["scored"]
    write_json(tmp_path / "protocol.json", noted)
    with pytest.raises(ValueError, match=r"protocol\.json holds .*expected a list of what was declared"):
        declare(tmp_path, config_of("Another."))
