"""Every method and a few variants through the command line, in one tiny run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nspec
from nspec import cli
from nspec.baselines.lass import WeightMasks
from nspec.run.systems import SYSTEMS

ROOT = Path(__file__).resolve().parents[2]

Tiny = Any  # tests/system/conftest.py

# Of what differs in a formula one is enough here.
SYSTEMS = [name for name in SYSTEMS if not name.startswith("update_") and name not in ("pcgrad", "temperature")]
VARIANTS = {
    "measured": "forward select.rule=loss select.tolerance=0.05 select.by=layer",
    "tenth": "random profile.share=0.3 select.k=0.6",
    "rows": "update specialize.optimizer=row_sparse_adamw",
    "apart": "neurons+shared select.rule=conflict select.share=0.1 specialize.neurons_lr=0.02",
    "half": "lass lass.alpha=0.5",
    "out": "forward_decoder select.k_from_decoder=0.7 select.k_to_decoder=1 specialize.silent=true",
}


def nspec_run(run: Tiny) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nspec.cli", "run", str(run.config)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


@pytest.fixture(scope="module")
def compared(another: Callable[[str], Tiny]) -> Tiny:
    run = another("compared")
    lines = "".join(f"    - {name} = {meaning}\n" for name, meaning in VARIANTS.items())
    text = run.config.read_text().replace(
        f"run: {{folder: {run.folder}, threads: 1}}",
        f"run:\n  folder: {run.folder}\n  threads: 1\n  systems: [{', '.join(SYSTEMS)}]\n  variants:\n{lines}",
    )
    text += "finetune: {updates: 2}\nbilingual: {updates: 3}\nadapters: {bottleneck: 4, lr: 0.01}\n"
    run.config.write_text(text)
    done = nspec_run(run)
    assert done.returncode == 0, done.stderr
    run.output, run.errors = done.stdout, done.stderr
    return run


def summary(run: Tiny, system: str) -> Any:
    return json.loads((run.folder / "systems" / system / "summary.json").read_text())


def weights(run: Tiny, system: str) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "systems" / system / "model" / "model.safetensors")


@pytest.mark.parametrize("system", [*SYSTEMS, *VARIANTS])
def test_every_system_is_scored_and_accounted_for(compared: Tiny, system: str) -> None:
    scores = json.loads((compared.folder / "scores" / system / "scores.json").read_text())
    assert set(scores["tasks"]) == {"de-en", "en-de"}
    found = summary(compared, system)
    assert found["updates"] > 0
    assert found["tokens"] > 0
    assert {"parameters", "parameters_added", "parameters_trained", "mask_bytes", "train_seconds"} <= set(found)
    assert system in compared.output


def test_adapters_leave_the_dense_weights_as_they_are(compared: Tiny) -> None:
    dense, own = weights(compared, "dense"), weights(compared, "adapters")
    assert all(torch.equal(own[name], value) for name, value in dense.items())
    added = {name: value for name, value in own.items() if name not in dense}
    assert sum(value.numel() for value in added.values()) == summary(compared, "adapters")["parameters_added"]
    assert any(bool(value.any()) for name, value in added.items() if "up" in name)  # they have learned
    assert summary(compared, "adapters")["parameters_trained"] == summary(compared, "adapters")["parameters_added"]


def test_one_side_is_specialised_and_the_other_is_dense(compared: Tiny) -> None:
    both = nspec.NeuronMasks.load(compared.folder / "masks")
    for side in ("encoder", "decoder"):
        masks = nspec.NeuronMasks.load(compared.folder / "systems" / f"forward_{side}" / "model" / "masks")
        assert masks.layers == [layer for layer in both.layers if side in layer]
        assert all(torch.equal(masks[task][layer], both[task][layer]) for task in masks.tasks for layer in masks.layers)


def test_lass_keeps_the_share_that_alpha_leaves(compared: Tiny) -> None:
    for folder, kept in [("weight_masks", 0.7), ("variants/half/weight_masks", 0.5)]:
        masks = WeightMasks.load(compared.folder / folder)
        shares = [share for layers in masks.density().values() for share in layers.values()]
        assert all(abs(share - kept) < 0.01 for share in shares)
    assert summary(compared, "half")["mask_bytes"] > 0


def test_random_masks_of_a_variant_have_the_sizes_of_its_own(compared: Tiny) -> None:
    own = nspec.NeuronMasks.load(compared.folder / "variants" / "tenth" / "masks").density()
    random = nspec.NeuronMasks.load(compared.folder / "variants" / "tenth" / "random_masks").density()
    assert own == random
    assert own != nspec.NeuronMasks.load(compared.folder / "masks").density()


def test_models_for_each_direction_are_whole_and_differ(compared: Tiny) -> None:
    for system in ("finetuned", "bilingual"):
        models = [
            load_file(compared.folder / "systems" / system / task / "model" / "model.safetensors")
            for task in ("de-en", "en-de")
        ]
        assert any(not torch.equal(models[0][name], models[1][name]) for name in models[0])
        assert summary(compared, system)["parameters"] == 2 * summary(compared, "dense")["parameters"]


@pytest.mark.parametrize("system", ["finetuned", "adapters", "lass", "heads"])
def test_every_kind_of_system_translates_text(
    compared: Tiny, system: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("Monday\n\n")
    options = ["--run", str(compared.folder), "--system", system, "--input", str(source), "--threads", "1"]
    assert cli.main(["translate", "--task", "en-de", *options]) == 0
    assert capfd.readouterr().out.count("\n") == 2
    assert cli.main(["translate", "--task", "en-xx", *options]) == 2
    assert "en-xx" in capfd.readouterr().err


def test_started_again_nothing_is_done_twice(compared: Tiny) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(compared.folder).glob("*/*/summary.json")}
    again = nspec_run(compared)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
