"""A run that takes a model that is there, as who has a trained multilingual model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nspec import cli

Tiny = Any  # tests/system/conftest.py


def test_a_pretrained_model_can_be_the_dense_one_as_it_is(
    tiny: Tiny, fresh: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.folder / "systems" / "dense" / "model"
    sets = [f"model.pretrained={model}", "train.updates=0", "run.systems=[dense, continued, forward]"]
    assert cli.main(["run", str(fresh.config), *(part for value in sets for part in ("--set", value))]) == 0
    output = capsys.readouterr().out

    dense = fresh.folder / "systems" / "dense"
    before, after = (load_file(place / "model.safetensors") for place in (model, dense / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "forward" in output

    summary = json.loads((dense / "summary.json").read_text())
    assert (summary["updates"], summary["tokens"], summary["tokens_per_second"]) == (0, 0, None)
    assert read(dense, "scores.json") == read(tiny.folder / "systems" / "dense", "scores.json")
    (measured,) = [json.loads(line) for line in (dense / "log.jsonl").read_text().splitlines()]
    assert summary["best_value"] == measured["valid_loss"] > 0
    last = [json.loads(line) for line in (tiny.folder / "systems" / "dense" / "log.jsonl").read_text().splitlines()]
    assert measured["valid_loss"] in [row.get("valid_loss") for row in last]  # the prepared text is the same
    assert "Continued" in (fresh.folder / "report" / "index.html").read_text()


def read(system: Path, name: str) -> Any:
    scores = json.loads((system.parents[1] / "scores" / system.name / name).read_text())
    return {task: entry["bleu"] for task, entry in scores["tasks"].items()}
