"""Training a system, exactly resumable, on one or more ranks: set-up, resuming, model and summary."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from nspec import processes
from nspec.files import write_json
from nspec.mt.methods import Method
from nspec.mt.model import put_back, save_system
from nspec.mt.model_files import load_weights
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.text.prepared import PreparedData
from nspec.mt.training import checkpoints
from nspec.mt.training.checkpoints import TrainingLog, TrainingState
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loop import Loop, TrainingDiverged
from nspec.mt.training.memory import PeakMemory
from nspec.mt.training.precision import precision_note, resolve_precision
from nspec.mt.training.recipe import Recipe
from nspec.mt.training.resuming import resume_point
from nspec.mt.training.validation import Validator
from nspec.processes import World

logger = logging.getLogger(__name__)


def train_system(
    system: str,
    settings: TrainConfig,
    data: PreparedData,
    model: PreTrainedModel,
    folder: Path,
    *,
    seed: int = 1,
    device: str = "auto",
    decode: DecodeConfig | None = None,
    method: Method | None = None,
    recipe: Recipe | None = None,
    show: bool = True,
    starting: Callable[[], None] | None = None,
) -> None:
    """Trains a system to the end, or goes on where an earlier call was stopped or killed.

    On a CPU the result is bitwise that of a training which was never interrupted. One that has ended goes on when it is
    given more ``updates``, or more ``patience`` where it stopped early, as if it had been given them from the start; no
    other option that the updates depend on may change. Under ``torchrun`` every process calls this; they share the
    micro-batches of each update.

    Args:
        system: its name, for the log and the progress display.
        settings: how it is trained. With no updates the model is measured and taken as it is.
        data: the prepared text.
        model: the weights to start from; ``method`` is applied to it here, and it holds the best weights in the end.
        folder: gets ``log.jsonl``, ``tensorboard/``, ``checkpoints/`` and in the end ``model/`` and ``summary.json``.
        seed: of sampling and dropout.
        device: ``auto`` (the first GPU, else the CPU), ``cpu`` or ``cuda``.
        decode: the limits of translations for validation BLEU; None: the defaults.
        method: what makes the system other than dense; knows every task of ``data``.
        recipe: what makes the training other than plain: gradient surgery, a curriculum, Reptile.
        show: a bar on a terminal, else a line for each validation, on standard error.
        starting: the first process calls it when all is checked, before it changes what is in ``folder``.

    Raises:
        ValueError: settings that contradict each other, a task that the method does not know, checkpoints of another
            training, or none that is whole; a log that cannot be read. Nothing has been changed then.
        TrainingDiverged: a loss or gradient is not finite, that of a model taken as it is too; the checkpoints are
            intact.
        SystemExit: SIGTERM came (single process); a checkpoint was saved and the next call goes on from it.
    """
    folder = Path(folder)
    World().connect(device)
    _check(settings, data, method, recipe)
    on, decode = processes.resolve_device(device), decode or DecodeConfig()
    precision = resolve_precision(settings.precision, on, int(getattr(model.config, "hidden_size", 0)))
    if processes.rank() == 0:
        put_back(folder / "model")
    processes.barrier()
    point = resume_point(system, folder, settings, seed, method, recipe)
    state, place = point.progress, folder / "checkpoints"
    if (lost := checkpoints.log_damage(folder, state, point.undone)) and processes.rank() == 0:
        logger.warning("%s: %s; they are not in the curves of the report", system, lost)
    if point.trained:
        logger.info("%s: %s is trained already", system, folder)
        processes.barrier()
        if processes.rank() == 0:  # a kill may have come before this was done
            checkpoints.keep_end(place)
        return
    if processes.rank() == 0 and (note := precision_note(settings.precision, on)):
        logger.warning("%s: %s", system, note)
    dense = sum(p.numel() for p in model.parameters())
    if method is not None:
        method.attach(model)
    processes.barrier()  # every process has read what may be deleted now
    if processes.rank() == 0:
        if starting is not None:
            starting()
        point.tidy(place)
    processes.barrier()
    memory = PeakMemory(on)
    cast(nn.Module, model).to(on)
    if not state.stopped:
        validator = Validator(model, data, settings, decode, precision=precision)
        if settings.updates == 0:
            _measure(validator, settings, precision, state, folder)
        else:
            shown = system if show else None
            Loop(settings, data, model, method, precision, seed, validator, folder, point, shown, recipe).run()
    if settings.updates:
        load_weights(model, place / f"checkpoint-{state.best_step}")
    model.eval()
    summary = _summary(system, settings, model, state, method, precision)
    summary |= {"recipe": recipe.name if recipe else None, "peak_memory_bytes": memory.bytes()}
    if processes.rank() == 0:
        save_system(model, data.tokenizer, folder / "model", method)
        summary["weights_sha256"] = checkpoints.weights_digest(folder / "model")  # so that neither is another's
        write_json(folder / "summary.json", summary | {"parameters_added": summary["parameters"] - dense})
        checkpoints.keep_end(place)  # so that it can be trained on for more updates
    processes.barrier()


def _check(settings: TrainConfig, data: PreparedData, method: Method | None, recipe: Recipe | None) -> None:
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate launch asks for {name}, and the processes of a run each hold the whole model "
                "(DistributedDataParallel): launch without it"
            )
    if method is not None and (lost := [task for task in data.tasks if task not in method.tasks]):
        what = "masks" if method.mode else method.name
        raise ValueError(f"no {what} for {', '.join(lost)}; there are {what} for {', '.join(method.tasks)}")
    if settings.optimizer == "row_sparse_adamw" and not (method and method.by_rows):
        raise ValueError("optimizer row_sparse_adamw needs a specialised model; take adamw for a dense one")
    if settings.best == "bleu" and settings.valid_bleu_sentences == 0:
        raise ValueError("best is bleu, so valid_bleu_sentences must be above 0")
    for name in ("updates", "accumulate", "batch_tokens", "tasks_per_batch", "valid_every", "log_every"):
        if getattr(settings, name) < (least := 0 if name == "updates" else 1):
            raise ValueError(f"{name} is {getattr(settings, name)}; expected at least {least}")
    if recipe is not None:
        if method is not None:
            raise ValueError(
                f"{recipe.name} trains a dense model, and this one has {method.name}; leave one of them out"
            )
        recipe.check(settings, processes.world())
    if settings.accumulate % processes.world():
        raise ValueError(
            f"accumulate is {settings.accumulate}, the micro-batches of an update over all processes; "
            f"expected a multiple of the {processes.world()} processes"
        )


def _measure(validator: Validator, settings: TrainConfig, precision: str, state: TrainingState, folder: Path) -> None:
    """A model that is taken as it is: its validation is the only line of the log."""
    measured = validator.measure()
    if not math.isfinite(measured["valid_loss"]):
        raise TrainingDiverged(
            f"the validation loss of the model that is taken as it is (train.updates is 0) is {measured['valid_loss']} in "
            f"{precision}: it computes numbers that are not finite; take another model, or train.precision=fp32"
        )
    state.best_value = measured[f"valid_{settings.best}"]
    if processes.rank() == 0:
        log = TrainingLog(folder, 0)
        log.write({"step": 0, **measured})
        log.close()


def _summary(
    system: str,
    settings: TrainConfig,
    model: PreTrainedModel,
    state: TrainingState,
    method: Method | None,
    precision: str,
) -> dict[str, Any]:
    return {
        "system": system,
        "method": method.name if method else None,
        "mode": method.mode if method else None,
        "updates": state.step,
        "micro_batches": state.step * settings.accumulate,
        "train_seconds": state.seconds,
        "tokens": state.tokens,
        "tokens_per_second": state.tokens / max(state.seconds, 1e-9) if state.step else None,
        "best_step": state.best_step,
        "best_value": state.best_value,
        "best_metric": settings.best,
        "stopped_early": state.step < settings.updates,
        "skipped_updates": state.skipped,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **(method.facts() if method else {"density": None, "mask_bytes": 0}),
        "precision": precision,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
