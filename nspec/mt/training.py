"""Training a system on transformers' Seq2SeqTrainer: a task a micro-batch, exactly resumable, on one or more ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_callback import PrinterCallback

import nspec
from nspec.files import write_json
from nspec.mt import checkpoints, distributed
from nspec.mt.checkpoints import Progress, TrainingLog
from nspec.mt.collate import collate
from nspec.mt.config import Config, TrainConfig
from nspec.mt.data import PairDataset, PreparedData
from nspec.mt.evaluation import Validator
from nspec.mt.loss import label_smoothed_loss
from nspec.mt.model import quiet_transformers, save_system
from nspec.mt.sampling import TaskBatchSampler
from nspec.mt.supervision import Supervisor, stopping_on_sigterm
from nspec.nn.masked_linear import Mode

logger = logging.getLogger(__name__)

# What may be different when a training goes on: it changes what is measured and when it ends, not the updates.
_FREE = {"updates", "valid_every", "valid_bleu_sentences", "patience", "log_every", "compile"}


class TaskTrainer(Seq2SeqTrainer):
    """``Seq2SeqTrainer`` whose micro-batches hold one task each.

    Ours are the batches (they come from a sampler that already knows rank and world), the task switch around each
    forward and backward pass, the loss, optimiser and schedule. Logging, validation and checkpoints are with
    :class:`nspec.mt.supervision.Supervisor`, which reads the attributes below before each optimiser step.

    Attributes:
        losses: of the micro-batches of this update, each divided by the tokens of the whole update; on the device.
        tasks: of the same micro-batches.
        tokens: real source and target tokens in them.
        targets: target tokens of the update, over all processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: Seq2SeqTrainingArguments,
        settings: TrainConfig,
        batches: DataLoader[Any],
        *,
        switching: bool,
    ) -> None:
        self.settings, self.batches, self.switching = settings, batches, switching
        self.reset()
        super().__init__(
            model=model, args=arguments, train_dataset=batches.dataset, compute_loss_func=self._smoothed_loss
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the token count is for our loss, not for the model's layers

    def reset(self) -> None:
        """Begins a new update."""
        self.losses: list[torch.Tensor] = []
        self.tasks: list[str] = []
        self.tokens = 0
        self.targets: torch.Tensor | int | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.batches

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            assert self.model is not None
            self.optimizer = build_optimizer(self.model, self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            warmup = self.settings.warmup
            self.lr_scheduler = LambdaLR(optimizer, lambda done: inverse_square_root(done + 1, warmup))
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        task = inputs.pop("task")
        self.tasks.append(task)
        self.tokens += int(inputs["attention_mask"].sum()) + int(inputs["labels"].ne(-100).sum())
        self.targets = num_items_in_batch  # one tensor for the whole update: not read here, which would be a sync
        with nspec.task(model, task) if self.switching else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def _smoothed_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = label_smoothed_loss(outputs.logits, labels, self.settings.label_smoothing, num_items_in_batch)
        self.losses.append(loss.detach().clone())  # the Trainer multiplies it in place by the number of processes
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # nobody reads it

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None  # the supervisor measures and clips once


def inverse_square_root(update: int, warmup: int) -> float:
    """The factor on the learning rate at an update (from 1) after ``w`` of warm-up, ``min(u / w, sqrt(w / u))``.

    It is fairseq's. transformers' ``get_inverse_sqrt_schedule`` is one update behind, so that the first one does
    nothing. A warm-up of 0 counts as 1.
    """
    warmup = max(warmup, 1)
    return min(update / warmup, math.sqrt(warmup / update))


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that ``settings`` names. Weight decay is for matrices, not for biases and norms.

    Raises:
        ValueError: ``row_sparse_adamw`` for a model that is not specialised.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps}
    if settings.optimizer == "row_sparse_adamw":
        return nspec.RowSparseAdamW(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``; ``auto`` is bf16 on a GPU that computes in it."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def train_system(
    system: str,
    config: Config,
    settings: TrainConfig,
    data: PreparedData,
    model: PreTrainedModel,
    folder: Path,
    *,
    masks: nspec.NeuronMasks | None = None,
    mode: Mode | None = None,
    progress: bool = True,
) -> None:
    """Trains a system to the end, or goes on where an earlier call was stopped or killed.

    On a CPU the result is bitwise that of a training which was never interrupted. Under ``torchrun`` every process
    calls this; they share the micro-batches of each update.

    Args:
        system: its name, for the log and the progress display.
        config: seed, device and decoding limits.
        settings: how it is trained.
        data: the prepared text.
        model: the weights to start from; specialised here when masks are given, and holding the best ones in the end.
        folder: gets ``log.jsonl``, ``tensorboard/``, ``checkpoints/`` and in the end ``model/`` and ``summary.json``.
        masks: the active neurons of every task of ``data``.
        mode: ``forward`` or ``update``; goes with ``masks``.
        progress: show a bar on a terminal, else a line for each validation, on standard error.

    Raises:
        ValueError: settings that contradict each other, a task without masks, or checkpoints of another training.
        TrainingDiverged: a loss or gradient is not finite; the checkpoints are intact.
        SystemExit: SIGTERM came (single process); a checkpoint was saved and the next call goes on from it.
    """
    folder = Path(folder)
    _check(settings, data, masks, mode)
    state, resumed = _state(folder, settings, config.run.seed, masks, mode)
    trained = (folder / "summary.json").is_file() and (folder / "model" / "config.json").is_file()
    if trained and (resumed is None or state.stopped):
        logger.info("%s: %s is trained already", system, folder)
        return
    device = distributed.resolve_device(config.run.device)
    precision = resolve_precision(settings.precision, device)
    if masks is not None and mode is not None:
        nspec.specialize(model, masks, mode=mode)
    if not state.stopped:
        shown = system if progress else None
        _train(config, settings, data, model, folder, state, resumed, device, precision, mode, shown)
    best = folder / "checkpoints" / f"checkpoint-{state.best_step}"
    load_weights(model, best if best.is_dir() else folder / "model")  # there when a finished training went on
    model.eval()
    (tokens,) = distributed.all_sum([state.tokens])
    if distributed.rank() == 0:
        save_system(model, data.tokenizer, folder / "model", masks, mode)
        write_json(folder / "summary.json", _summary(system, settings, model, state, int(tokens), masks, mode, device, precision))
        checkpoints.keep_only(folder / "checkpoints", checkpoints.whole(folder / "checkpoints")[-1:])
    distributed.barrier()


def _check(settings: TrainConfig, data: PreparedData, masks: nspec.NeuronMasks | None, mode: Mode | None) -> None:
    if (masks is None) != (mode is None):
        raise ValueError(f"masks and mode go together; masks are {'given' if masks else 'not given'}, mode is {mode!r}")
    if masks is not None and (lost := [task for task in data.tasks if task not in masks.tasks]):
        raise ValueError(f"no masks for {', '.join(lost)}; there are masks for {', '.join(masks.tasks)}")
    if settings.optimizer == "row_sparse_adamw" and masks is None:
        raise ValueError("optimizer row_sparse_adamw needs a specialised model; take adamw for a dense one")
    if settings.best == "bleu" and settings.valid_bleu_sentences == 0:
        raise ValueError("best is bleu, so valid_bleu_sentences must be above 0")
    for name in ("updates", "accumulate", "batch_tokens", "valid_every", "log_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; expected at least 1")


def _state(
    folder: Path, settings: TrainConfig, seed: int, masks: nspec.NeuronMasks | None, mode: Mode | None
) -> tuple[Progress, Path | None]:
    """Where training stands, and the checkpoint to go on from; partial checkpoints are deleted."""
    options = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE}
    options |= {"seed": seed, "mode": mode, "masks": _digest(masks)}
    found = checkpoints.whole(folder / "checkpoints")
    distributed.barrier()
    if distributed.rank() == 0:
        checkpoints.keep_only(folder / "checkpoints", found)
    if not found:
        return Progress(options=options), None
    state = Progress.read(found[-1])
    if changed := [
        f"{k} was {state.options.get(k)!r}, is {v!r}" for k, v in options.items() if state.options.get(k) != v
    ]:
        raise ValueError(
            f"{folder / 'checkpoints'} is of a training with other options: {'; '.join(changed)}; "
            "take those again, or another folder"
        )
    if state.stopped and state.step < settings.updates and not _exhausted(state, settings):
        state.stopped = False  # more updates or more patience than before
    if distributed.rank() > 0:
        state.tokens = state.window_tokens = 0  # the stored sums are those of all processes; rank 0 carries them on
        state.window_loss = 0.0
    return state, found[-1]


def _exhausted(state: Progress, settings: TrainConfig) -> bool:
    return 0 < settings.patience <= state.worse


def _digest(masks: nspec.NeuronMasks | None) -> str | None:
    if masks is None:
        return None
    digest = hashlib.sha256()
    for task in masks.tasks:
        for layer, mask in masks[task].items():
            digest.update(f"{task} {layer} ".encode() + bytes(mask.to(torch.uint8).tolist()))
    return digest.hexdigest()


def _train(
    config: Config,
    settings: TrainConfig,
    data: PreparedData,
    model: PreTrainedModel,
    folder: Path,
    state: Progress,
    resumed: Path | None,
    device: torch.device,
    precision: str,
    mode: Mode | None,
    shown: str | None,
) -> None:
    """Trains until ``state.stopped``; ``state`` and the checkpoints tell the caller what came of it."""
    with quiet_transformers():
        arguments = _arguments(config, settings, folder, device, precision)
        rank, world = distributed.rank(), distributed.world()
        if settings.accumulate % world:
            raise ValueError(
                f"accumulate is {settings.accumulate}, the micro-batches of an update over all processes; "
                f"expected a multiple of the {world} processes"
            )
        arguments.gradient_accumulation_steps = settings.accumulate // world
        micro_batches = settings.updates * settings.accumulate
        sampler = TaskBatchSampler(
            data, "train", settings.batch_tokens, settings.temperature, micro_batches, config.run.seed, rank, world
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
        trainer = TaskTrainer(model, arguments, settings, batches, switching=mode is not None)
        validator = Validator(model, data, settings, config.decode, masked=mode == "forward", bf16=precision == "bf16")
        log = TrainingLog(folder, state.step) if rank == 0 else None
        supervisor = Supervisor(trainer, validator, state, log, shown if rank == 0 else None)
        trainer.add_callback(supervisor)
        torch.manual_seed(config.run.seed + rank)  # dropout must differ between processes
        try:
            with stopping_on_sigterm(supervisor):
                trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        finally:
            supervisor.close()
            for name in ("forward", "_original_forward"):  # where accelerate has put autocast
                vars(model).pop(name, None)
            model.zero_grad(set_to_none=True)
    if supervisor.terminated and not state.stopped:
        raise SystemExit(143)


def _arguments(
    config: Config, settings: TrainConfig, folder: Path, device: torch.device, precision: str
) -> Seq2SeqTrainingArguments:
    """Everything that we do ourselves is off: logging, evaluation, saving, clipping, reporting."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.updates,
        max_grad_norm=0.0,
        ignore_data_skip=True,  # the sampler begins where training goes on
        seed=config.run.seed,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        ddp_backend="gloo" if device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
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


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copies ``model.safetensors`` of a folder into the model; names that are tied to a stored one may be missing.

    Raises:
        ValueError: the file has other parameters than the model.
    """
    stored = load_file(folder / "model.safetensors")
    result = model.load_state_dict(stored, strict=False)
    own = model.state_dict()
    covered = {own[name].data_ptr() for name in stored if name in own}
    missing = [name for name in result.missing_keys if own[name].data_ptr() not in covered]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{folder / 'model.safetensors'} is not of this model: it lacks {missing[:3]} and has "
            f"{result.unexpected_keys[:3]}, which the model has not"
        )


def _mean_density(masks: nspec.NeuronMasks) -> float:
    shares = [share for layers in masks.density().values() for share in layers.values()]
    return sum(shares) / len(shares)


def _summary(
    system: str,
    settings: TrainConfig,
    model: nn.Module,
    state: Progress,
    tokens: int,
    masks: nspec.NeuronMasks | None,
    mode: Mode | None,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    return {
        "system": system,
        "mode": mode,
        "updates": state.step,
        "micro_batches": state.step * settings.accumulate,
        "train_seconds": state.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(state.seconds, 1e-9),
        "best_step": state.best_step,
        "best_value": state.best_value,
        "best_metric": settings.best,
        "parameters": sum(p.numel() for p in model.parameters()),
        "density": None if masks is None else _mean_density(masks),
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
