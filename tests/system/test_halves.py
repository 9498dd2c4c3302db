"""How stable a run's selection is, measured on the halves of its text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import nspec
from nspec import cli
from nspec.report import measured_halves

Tiny = Any  # tests/system/conftest.py


def test_halves_of_the_text_are_profiled_and_selected_from_by_themselves(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny.folder, run)
    assert cli.main(["analyze", str(run), "--halves"]) == 0
    assert "Does each half of the text select the same neurons?" in capfd.readouterr().out
    found = measured_halves.load(run)
    assert found is not None
    one, two, outdated = found
    assert not outdated
    whole = nspec.NeuronMasks.load(run / "masks")
    assert one.tasks == two.tasks == whole.tasks
    rows = measured_halves.compare_halves(one, two)
    assert [row.layer for row in rows] == ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"]
    for row in rows:
        pairs = [(one[task][row.layer], two[task][row.layer]) for task in one.tasks]
        iou = [float((a & b).sum() / (a | b).sum()) for a, b in pairs]
        assert row.halves == pytest.approx(sum(iou) / len(iou))
        assert row.chance < row.halves <= 1
    assert any(not torch.equal(one[task][row.layer], two[task][row.layer]) for task in one.tasks for row in rows)
    assert cli.main(["report", str(tiny.config), "--set", f"run.folder={run}"]) == 0
    page = (run / "report" / "index.html").read_text()
    assert f"<td>{rows[0].halves:.3f}</td>" in page
