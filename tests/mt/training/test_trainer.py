"""Two processes train what one trains, where each leaves parameters of the others unused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_translation
from toy_translation import Toy, launch, rows, weights

from nspec.baselines import lass
from nspec.mt.config import AdaptersConfig
from nspec.mt.model import save_system
from nspec.mt.text.batches import TaskBatchSampler
from nspec.mt.training.config import FinetuneConfig, SpecializeConfig
from nspec.run.config import Config, RunConfig
from nspec.run.train_systems import make_system

pytestmark = pytest.mark.slow

TOGETHER = [
    "adapters",
    "adapters_family",
    "lass",
    "forward",
    "neurons",
    "neurons+shared",
]  # one model for all directions
SETTINGS: dict[str, Any] = {
    "updates": 4,
    "accumulate": 4,
    "batch_tokens": 96,
    "lr": 3e-3,
    "warmup": 2,
    "valid_every": 4,
    "valid_bleu_sentences": 0,
    "log_every": 1,
    "precision": "fp32",
}

SCRIPT = f"""
import sys
from pathlib import Path
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_trainer

torch.set_num_threads(1)
test_trainer.make_all(Path(sys.argv[1]), "two")
torch.distributed.destroy_process_group()
"""


def prepared(folder: Path) -> Toy:
    """Text of two Germanic languages and a Romance one, a dense model without dropout, and weight masks."""
    toy_translation.ALPHABETS["nl"] = "KLMNOPQRST"
    return Toy(folder, languages=("de", "nl", "fr"))


def config_of(toy: Toy) -> Config:
    config = toy.config(model={"dropout": 0.0, "attention_dropout": 0.0})
    config.run = RunConfig(device="cpu", seed=5)
    config.specialize = SpecializeConfig(**SETTINGS)
    config.adapters = AdaptersConfig(bottleneck=4, lr=1e-2)
    config.finetune = FinetuneConfig(updates=2, lr=3e-3)
    return config


def make_all(folder: Path, name: str) -> None:
    """Trains every system from the one dense model, in this process or as one of several."""
    toy = prepared(folder)
    few = copy.copy(toy.data)
    few.tasks = few.tasks[:2]
    for system, data in [*((system, toy.data) for system in TOGETHER), ("finetuned", few)]:
        make_system(system, config_of(toy), folder / "run", data, folder / name / system)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the systems made by ``one`` process and by ``two``."""
    folder = tmp_path_factory.mktemp("shared")
    toy = prepared(folder)
    config, data = config_of(toy), toy.data
    save_system(toy.model(config), data.tokenizer, folder / "run" / "systems" / "dense" / "model", None)
    kept = {task: lass.magnitude_masks(toy.model(config, seed), 0.5) for seed, task in enumerate(data.tasks)}
    lass.WeightMasks(kept).save(folder / "run" / "weight_masks")
    toy.masks(data.tasks).save(folder / "run" / "masks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make_all(folder, "one")
    torch.set_num_threads(threads)
    launch(SCRIPT, [str(folder)], ranks=2)
    return folder


def test_the_processes_draw_different_directions(trained: Path) -> None:
    """Only then do the processes leave adapters unused that the other one has used."""
    config, data = config_of(prepared(trained)), prepared(trained).data
    settings = config.specialize
    micro_batches = settings.updates * settings.accumulate
    sampler = TaskBatchSampler(data, "train", settings.batch_tokens, settings.temperature, micro_batches, 5)
    updates = sampler.plan.reshape(settings.updates, -1, 2)  # [update, micro-batch, process]
    alone = [set(update[:, 0]) ^ set(update[:, 1]) for update in updates]
    early = [set(update[:-1].flat) - set(update[-1]) for update in updates]
    assert all(alone)  # in every update a direction that only one of the processes has
    assert any(early)  # and in some one that none of them has in its last micro-batch
    assert any(len(np.unique(update)) < len(data.tasks) for update in updates)  # or in no micro-batch at all


@pytest.mark.parametrize("system", TOGETHER)
def test_two_processes_make_the_system_of_one(trained: Path, system: str) -> None:
    one, two = (trained / name / system for name in ("one", "two"))
    compare(one, two)


def test_two_processes_fine_tune_each_direction_as_one_does(trained: Path) -> None:
    one, two = (trained / name / "finetuned" for name in ("one", "two"))
    tasks = sorted(folder.name for folder in one.iterdir() if folder.is_dir())
    assert tasks == ["de-en", "en-de"]
    for task in tasks:
        compare(one / task, two / task)
        assert not (two / task / "checkpoints").exists()
    assert counted(one) == counted(two)


def compare(one: Path, two: Path) -> None:
    for alone, shared in zip(rows(one), rows(two), strict=True):
        assert numbers(shared) == pytest.approx(numbers(alone), rel=1e-5)
    a, b = weights(one / "model"), weights(two / "model")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert counted(one) == counted(two)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    tasks = row.get("tasks", {})
    flat = row | {f"{task}/{name}": value for task, values in tasks.items() for name, value in values.items()}
    return {name: value for name, value in flat.items() if isinstance(value, (int, float))}


def counted(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("updates", "micro_batches", "tokens", "parameters", "parameters_trained")}
