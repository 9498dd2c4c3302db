"""Training a system on transformers' Seq2SeqTrainer, exactly resumable, on one or more ranks."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Seq2SeqTrainingArguments

from nspec import processes
from nspec.files import disk_error, write_json
from nspec.mt.methods import Method
from nspec.mt.model import put_back, save_system
from nspec.mt.model_files import load_weights, quiet_transformers
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.text.batches import TaskBatchSampler
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import PairDataset, PreparedData
from nspec.mt.training import checkpoints
from nspec.mt.training.checkpoints import Progress, TrainingLog
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.resuming import ResumePoint, resume_point
from nspec.mt.training.supervision import Supervisor, TrainingDiverged, stopping_on_sigterm
from nspec.mt.training.trainer import TaskTrainer, precision_note, resolve_precision
from nspec.mt.training.validation import Validator
from nspec.processes import World

logger = logging.getLogger(__name__)

_PRECISION = "ACCELERATE_MIXED_PRECISION"


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
    progress: bool = True,
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
        progress: show a bar on a terminal, else a line for each validation, on standard error.
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
    _check(settings, data, method)
    on, decode = processes.resolve_device(device), decode or DecodeConfig()
    precision = resolve_precision(settings.precision, on, int(getattr(model.config, "hidden_size", 0)))
    if processes.rank() == 0:
        put_back(folder / "model")
    processes.barrier()
    point = resume_point(system, folder, settings, seed, method)
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
    if settings.updates == 0:
        _measure(settings, decode, data, model, folder, state, on, precision)
    elif not state.stopped:
        shown = system if progress else None
        _train(settings, decode, seed, data, model, folder, point, on, precision, method, shown)
    if settings.updates:
        load_weights(model, place / f"checkpoint-{state.best_step}")
    model.eval()
    (tokens,) = processes.all_sum([state.tokens])
    if processes.rank() == 0:
        save_system(model, data.tokenizer, folder / "model", method)
        summary = _summary(system, settings, model, state, int(tokens), method, on, precision)
        summary["weights_sha256"] = checkpoints.weights_digest(
            folder / "model"
        )  # so that neither is taken for another's
        write_json(folder / "summary.json", summary | {"parameters_added": summary["parameters"] - dense})
        checkpoints.keep_end(place)  # so that it can be trained on for more updates
    processes.barrier()


def _check(settings: TrainConfig, data: PreparedData, method: Method | None) -> None:
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
    if settings.accumulate % processes.world():
        raise ValueError(
            f"accumulate is {settings.accumulate}, the micro-batches of an update over all processes; "
            f"expected a multiple of the {processes.world()} processes"
        )


def _measure(
    settings: TrainConfig,
    decode: DecodeConfig,
    data: PreparedData,
    model: PreTrainedModel,
    folder: Path,
    state: Progress,
    device: torch.device,
    precision: str,
) -> None:
    """A model that is taken as it is: its validation is the only line of the log."""
    cast(nn.Module, model).to(device)
    measured = Validator(model, data, settings, decode, precision=precision).measure()
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


def _train(
    settings: TrainConfig,
    decode: DecodeConfig,
    seed: int,
    data: PreparedData,
    model: PreTrainedModel,
    folder: Path,
    point: ResumePoint,
    device: torch.device,
    precision: str,
    method: Method | None,
    shown: str | None,
) -> None:
    """Trains until the progress says stopped; it and the checkpoints tell the caller what came of it."""
    state, resumed = point.progress, point.checkpoint
    with quiet_transformers(), _accelerate_precision(precision):
        arguments = _arguments(settings, seed, folder, device, precision)
        arguments.ddp_find_unused_parameters = method is not None and method.leaves_parameters
        rank, world = processes.rank(), processes.world()
        micro_batches = settings.updates * settings.accumulate
        sampler = TaskBatchSampler(
            data,
            "train",
            settings.batch_tokens,
            settings.temperature,
            micro_batches,
            seed,
            rank,
            world,
            settings.tasks_per_batch,
        )
        sampler.start = state.step * settings.accumulate
        batches: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", PairDataset(data, "train")),
            batch_sampler=sampler,
            collate_fn=collate,
            generator=torch.Generator(),  # else making an iterator would draw from the generator of the dropout
        )
        if settings.compile:
            model.compile(dynamic=True)
        trainer = TaskTrainer(model, arguments, settings, batches, method)
        validator = Validator(model, data, settings, decode, precision=precision)
        log = TrainingLog(folder, state.step, point.undone) if rank == 0 else None
        supervisor = Supervisor(trainer, validator, state, log, shown if rank == 0 else None)
        trainer.add_callback(supervisor)
        torch.manual_seed(seed + rank)  # dropout must differ between processes
        try:
            with stopping_on_sigterm(supervisor):
                trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        except Exception as error:
            if supervisor.saving:  # a full disk comes as three different types from three libraries
                place = folder / "checkpoints" / f"checkpoint-{state.step}"
                raise disk_error(error, place, "; those before it are intact") from error
            raise
        finally:
            supervisor.close()
            for name in ("forward", "_original_forward"):  # where accelerate has put autocast
                vars(model).pop(name, None)
            model._compiled_call_impl = None
            model.zero_grad(set_to_none=True)
    if (
        supervisor.terminated
    ):  # also where that was the last update: its checkpoint is there, and becomes the model next time
        raise SystemExit(143)


def _arguments(
    settings: TrainConfig, seed: int, folder: Path, device: torch.device, precision: str
) -> Seq2SeqTrainingArguments:
    """Everything that we do ourselves is off: logging, evaluation, saving, clipping, reporting."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.updates,
        gradient_accumulation_steps=settings.accumulate // processes.world(),
        max_grad_norm=0.0,
        ignore_data_skip=True,  # the sampler begins where training goes on
        seed=seed,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        ddp_backend="gloo" if device.type == "cpu" and processes.world() > 1 else None,
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: DataParallel would split the batches of a task
    return arguments


@contextmanager
def _accelerate_precision(precision: str) -> Iterator[None]:
    """Our precision rules, over what ``accelerate launch`` or an earlier training has put into the environment."""
    before = os.environ.get(_PRECISION)
    os.environ[_PRECISION] = "no" if precision == "fp32" else precision
    try:
        yield
    finally:
        del os.environ[_PRECISION]
        if before is not None:
            os.environ[_PRECISION] = before


def _summary(
    system: str,
    settings: TrainConfig,
    model: nn.Module,
    state: Progress,
    tokens: int,
    method: Method | None,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    return {
        "system": system,
        "method": method.name if method else None,
        "mode": method.mode if method else None,
        "updates": state.step,
        "micro_batches": state.step * settings.accumulate,
        "train_seconds": state.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(state.seconds, 1e-9) if state.step else None,
        "best_step": state.best_step,
        "best_value": state.best_value,
        "best_metric": settings.best,
        "stopped_early": state.step < settings.updates,
        "skipped_updates": state.skipped,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **(method.facts() if method else {"density": None, "mask_bytes": 0}),
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
