"""Training a causal language model on sequences with the Trainer of Transformers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

WARMUP = 0.1  # of the updates, in which the learning rate rises from 0


class TrainSettings(NamedTuple):
    """How a model is trained.

    Attributes:
        updates: optimiser steps.
        sequences: of a pass.
        accumulate: passes of a step.
        lr: the highest learning rate.
        schedule: ``constant``, ``linear`` or ``cosine``.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; 0: not cut.
        bf16: whether products are in bfloat16 (autocast).
        checkpointing: of activations.
        seed: of the order of the text.
    """

    updates: int
    sequences: int
    lr: float
    accumulate: int = 1
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = False
    checkpointing: bool = False
    seed: int = 1


class Trained(NamedTuple):
    """What a training took.

    Attributes:
        tokens: that went through the model.
        seconds: of the training loop.
        peak_bytes: most memory of the GPU; 0 on a CPU.
        loss: mean of the last tenth of the updates, nats a token.
    """

    tokens: int
    seconds: float
    peak_bytes: int
    loss: float


class _Pieces(Dataset[dict[str, Tensor]]):
    def __init__(self, pieces: Sequence[Tensor]) -> None:
        longest = max(map(len, pieces))
        self.pieces = [
            piece for piece in pieces if len(piece) == longest
        ]  # a batch has one length; the rest are one tail

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[number], "labels": self.pieces[number]}


class _Told(TrainerCallback):
    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(
    model: nn.Module,
    pieces: Sequence[Tensor],
    recipe: TrainSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Trains what of a model requires a gradient, in place, with fused AdamW.

    Args:
        model: of Transformers, on its device.
        pieces: token ids, int64 ``[length]`` each; those shorter than the longest are not used.
        recipe: how.
        progress: called as ``progress(updates done, updates in all)``.

    Raises:
        ValueError: the loss is not a number.
    """
    device = next(model.parameters()).device
    data = _Pieces(pieces)
    if recipe.checkpointing:
        # Not by TrainingArguments, which call it otherwise from one version to the next, as models do.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    told = _Told(progress or (lambda done, total: None))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=recipe.updates,
            per_device_train_batch_size=recipe.sequences,
            gradient_accumulation_steps=recipe.accumulate,
            learning_rate=recipe.lr,
            lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
            warmup_steps=max(1, round(WARMUP * recipe.updates)),
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            optim="adamw_torch_fused",
            bf16=recipe.bf16,
            seed=recipe.seed,
            dataloader_drop_last=len(data) >= recipe.sequences,  # so that every step has as many tokens
            save_strategy="no",
            logging_nan_inf_filter=False,  # else a loss that is no number is logged as the one before
            logging_strategy="steps",
            logging_steps=max(1, recipe.updates // 10),
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            use_cpu=device.type == "cpu",
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[told])
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)  # lines of figures between those of the run
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    loss = told.losses[-1] if told.losses else float("nan")
    if not loss == loss or loss in (float("inf"), float("-inf")):
        raise ValueError(f"the training loss is {loss}: the model has diverged; take a smaller learning rate")
    tokens = recipe.updates * recipe.accumulate * min(recipe.sequences, len(data)) * len(data.pieces[0])
    return Trained(tokens, seconds, peak, loss)
