"""Trains the systems that start from the dense model, each with what makes it, and the models for single directions."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import nspec
from nspec import processes
from nspec.analysis.languages import Grouping, group_of
from nspec.baselines import lass
from nspec.files import read_json, write_json
from nspec.mt import methods
from nspec.mt.model import build_model, load_system
from nspec.mt.text.prepared import PreparedData, languages_of_task
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.train import train_system
from nspec.run.config import Config
from nspec.run.stages import weight_masks_folder
from nspec.run.systems import (
    SYSTEMS,
    System,
    builtin_of,
    config_of,
    finetuned_system,
    heads_folder,
    masks_folder,
    recipe_of,
    system_of,
)


def make_system(
    system: str,
    config: Config,
    run: Path,
    data: PreparedData,
    folder: Path,
    starting: Callable[[], None] | None = None,
) -> None:
    """Trains a system other than dense to the end, or goes on with it.

    Args:
        system: its name.
        config: of the run.
        run: the run folder, with the dense model and the masks.
        data: the prepared text.
        folder: of the system. One with a model for each direction has a folder for each in it.
        starting: see :func:`~nspec.mt.training.train.train_system`.

    Raises:
        ValueError: see :func:`~nspec.mt.training.train.train_system`, or a language whose family is not known.
    """
    kind, own = system_of(config, system), config_of(config, system)
    if kind.method == "each":
        _make_each(system, own, kind, run, data, folder, starting)
        return
    method, settings = _method(system, config, own, kind, run, data)
    model, _ = load_system(run / "systems" / "dense" / "model", "cpu", SYSTEMS["dense"].made_by)  # the trainer moves it
    recipe = recipe_of(kind, own) if kind.recipe else None
    _train(system, own, settings, data, model, folder, method=method, recipe=recipe, starting=starting)


def _train(system: str, own: Config, settings: TrainConfig, *arguments: Any, **named: Any) -> None:
    run = own.run
    train_system(system, settings, *arguments, seed=run.seed, device=run.device, decode=own.decode, **named)


def _method(
    system: str, config: Config, own: Config, kind: System, run: Path, data: PreparedData
) -> tuple[methods.Method | None, TrainConfig]:
    settings: TrainConfig = own.specialize
    if kind.method not in methods.NEURONS:  # what has no neurons of its own goes on whatever their rate is
        settings = dataclasses.replace(own.specialize, neurons_lr=0.0)
    dense = dataclasses.replace(settings, optimizer="adamw")  # with every row in the task, row_sparse_adamw is this
    if kind.masks:
        place = masks_folder(config, system)
        assert place is not None
        if kind.method in methods.NEURONS:
            masks, shared = nspec.NeuronMasks.load(run / place), kind.method == methods.NEURONS[1]
            return methods.Neurons(masks, shared, own.specialize.neurons_lr), dense
        assert kind.mode
        masks = on_side(nspec.NeuronMasks.load(run / place), kind.side)
        return methods.NeuronSpecialization(masks, kind.mode, own.specialize.silent), settings
    if kind.method == "heads":
        heads = nspec.NeuronMasks.load(run / heads_folder(config, system))
        return methods.Heads(nspec.random_masks(heads, own.run.seed) if kind.drawn else heads), dense
    if kind.method == "weight_masks":
        return methods.Lass(lass.WeightMasks.load(run / weight_masks_folder(config, system))), dense
    if kind.method in methods.ADAPTERS:
        groups, shared = adapter_groups(system, config, data.tasks), kind.method == methods.ADAPTERS[1]
        width, lr = own.adapters.bottleneck, own.adapters.lr
        alone = dense if shared else dataclasses.replace(dense, lr=lr)
        return methods.Adapters(groups, width, own.run.seed, shared, lr if shared else 0.0), alone
    return None, dense


def on_side(masks: nspec.NeuronMasks, side: str) -> nspec.NeuronMasks:
    """The masks of the layers of one side (``encoder``, ``decoder``); all of them for an empty side.

    Raises:
        ValueError: there are none.
    """
    if not side:
        return masks
    try:
        return masks.only([side])
    except ValueError:
        raise ValueError(f"no layer of the masks is in the {side}; there are {', '.join(masks.layers)}") from None


def adapter_groups(system: str, config: Config, tasks: Sequence[str]) -> dict[str, str]:
    """The adapters that each direction has in a system with adapters: its own, or those of its language family.

    Raises:
        ValueError: the family of a language is not known.
    """
    own = config_of(config, system)
    if builtin_of(config, system) != "adapters_family":
        return {task: task for task in tasks}
    return {task: family_group(task, own.corpus.pivot, own.adapters.families) for task in tasks}


def family_group(task: str, pivot: str, families: str = "branch") -> str:
    """The adapters that a direction shares: ``en-Germanic`` for en-de, ``Germanic-en`` for de-en.

    The pivot stands for itself: else en-de and de-en would be one.

    Args:
        task: the direction.
        pivot: the language that directions go to and from.
        families: what counts as a family, see :func:`nspec.analysis.languages.group_of`.

    Raises:
        ValueError: the family of a language is not known.
    """
    grouping = cast("Grouping", families)
    return "-".join(code if code == pivot else group_of(code, grouping) for code in languages_of_task(task))


def prune(system: str, config: Config, run: Path, data: PreparedData, folder: Path, tell: Callable[..., None]) -> None:
    """The weights that LaSS keeps for each direction, from the models that were fine-tuned on it: ``weight_masks/``."""
    own, models = config_of(config, system), run / "systems" / finetuned_system(config, system)
    found = []  # packed at once: as bool tensors the masks of all directions would be as many models
    for number, task in enumerate(data.tasks):
        tell(task, number, len(data.tasks))
        model, _ = load_system(models / task / "model", "cpu", SYSTEMS["finetuned"].made_by)
        found.append(lass.WeightMasks({task: lass.magnitude_masks(model, own.lass.alpha)}))
    lass.WeightMasks.union_of_tasks(found).save(folder)
    tell("", len(data.tasks), len(data.tasks))


def _make_each(
    system: str,
    own: Config,
    kind: System,
    run: Path,
    data: PreparedData,
    folder: Path,
    starting: Callable[[], None] | None,
) -> None:
    """A model for each direction, in a folder for each; what is trained already is left as it is."""
    if kind.scratch:
        settings: TrainConfig = dataclasses.replace(own.train, updates=own.bilingual.updates)
    else:
        lr, updates = own.finetune.lr, own.finetune.updates
        settings = dataclasses.replace(own.specialize, updates=updates, lr=lr, optimizer="adamw")
    settings = dataclasses.replace(settings, tasks_per_batch=1, warmup=min(settings.warmup, settings.updates))
    for task in data.tasks:
        if kind.scratch:
            model = build_model(own.model, data.tokenizer, own.run.seed)
        else:
            model, _ = load_system(run / "systems" / "dense" / "model", "cpu", SYSTEMS["dense"].made_by)
        _train(f"{system} {task}", own, settings, data.only(task), model, folder / task, starting=starting)
        if processes.rank() == 0:  # an optimiser state for each direction would be three times the models
            shutil.rmtree(folder / task / "checkpoints", ignore_errors=True)
        processes.barrier()
    if processes.rank() == 0:
        parts = [read_json(folder / task / "summary.json") for task in data.tasks]
        write_json(folder / "summary.json", _together(system, parts))


def _together(system: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of models for single directions: sums, and of what is the same for all the first."""
    keys = ("updates", "micro_batches", "train_seconds", "tokens", "parameters", "parameters_trained")
    sums = {key: sum(part[key] for part in parts) for key in keys}
    kept = {key: parts[0][key] for key in ("mode", "density", "mask_bytes", "precision", "device", "threads")}
    speed = sums["tokens"] / max(sums["train_seconds"], 1e-9)
    memory = [part["peak_memory_bytes"] for part in parts if part.get("peak_memory_bytes") is not None]
    added = sums["parameters"]  # no weight is shared with the dense model
    return (
        kept
        | sums
        | {
            "system": system,
            "method": "each",
            "tokens_per_second": speed,
            "peak_memory_bytes": max(memory, default=None),
            "parameters_added": added,
            "best_step": None,
            "best_value": sum(part["best_value"] for part in parts) / len(parts),
            "best_metric": parts[0]["best_metric"],
        }
    )
