"""The Trainer of one system: the tasks of a micro-batch, the token-normalised loss, optimiser and schedule."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_callback import PrinterCallback

import nspec
from nspec.mt.methods import Method
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loss import label_smoothed_loss


class TaskTrainer(Seq2SeqTrainer):
    """``Seq2SeqTrainer`` whose micro-batches hold one task each, or sentences of several.

    Ours are the batches (they come from a sampler that already knows rank and world), the task switch around each
    forward and backward pass, the loss, optimiser and schedule. Logging, validation and checkpoints are with
    :class:`nspec.mt.training.supervision.Supervisor`, which reads the attributes below before each optimiser step.

    Attributes:
        losses: of the micro-batches of this update, each divided by the tokens of the whole update; on the device.
        tasks: of the same micro-batches; joined with " + " where one holds several.
        used: their tasks, each once.
        tokens: real source and target tokens in them.
        targets: target tokens of the update, over all processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: Seq2SeqTrainingArguments,
        settings: TrainConfig,
        batches: DataLoader[Any],
        method: Method | None = None,
    ) -> None:
        self.settings, self.batches, self.method = settings, batches, method
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
        self.used: set[str] = set()
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
        names = [task] if isinstance(task, str) else list(dict.fromkeys(task))
        self.tasks.append(" + ".join(names))
        self.used.update(names)
        self.tokens += int(inputs["attention_mask"].sum()) + int(inputs["labels"].ne(-100).sum())
        self.targets = num_items_in_batch  # one tensor for the whole update: not read here, which would be a sync
        with nspec.task(model, task) if self.method is not None else nullcontext():
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
        return nspec.RowSparseAdamW(groups, **options, model=model)
    # With loss scaling the fused one would skip a step by itself, where nobody sees it and the schedule goes on.
    return torch.optim.AdamW(groups, fused=settings.precision != "fp16", **options)


def resolve_precision(precision: str, device: torch.device, d_model: int) -> str:
    """``fp32``, ``bf16`` or ``fp16``; ``auto`` is bf16 on a GPU that has it, and for wide models on a CPU with AMX.

    On two cores with AMX a feed-forward block with d_model 512 was 3.5 times as fast in bf16 as in fp32, but training a
    model with d_model 192 was no faster: small products do not pay for the casts.

    Raises:
        ValueError: fp16 on a CPU, for which accelerate has no loss scaling.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision is fp16 and the device is the CPU; expected a GPU, as there is no loss scaling on the CPU: take "
            "bf16, fp32 or auto"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if _has_bfloat16() else "fp32"
    capabilities: dict[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # not in every torch that is supported
    wide = device.type == "cpu" and d_model >= 512
    return "bf16" if wide and capabilities.get("amx_bf16", False) else "fp32"


def precision_note(precision: str, device: torch.device) -> str | None:
    """What a user should know of a choice of precision on a GPU that only emulates bfloat16; None elsewhere."""
    if device.type != "cuda" or precision not in ("auto", "bf16") or _has_bfloat16():
        return None
    lacking = f"{torch.cuda.get_device_name(device)} has no bfloat16 but in emulation"
    if precision == "bf16":
        return f"{lacking}, which is slow: precision fp16 or fp32 is faster"
    return f"{lacking}: precision auto is fp32 there, fp16 is faster"


def _has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
