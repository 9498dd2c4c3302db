"""The systems that train: ways to train a model whose tasks have masks, and the memory that the masks take.

``dense`` has none, ``release`` is the authors' way, ``forward`` and ``update`` are ours. All start as copies of one model,
and differ in masks, mode and optimiser alone.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import nspec
from bench import release
from bench.report.summary import STEP_PARTS
from bench.steps.model import Batch, Masks, Shape, Tasks
from bench.timing import synchronize
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loop import build_optimizer
from nspec.mt.training.loss import label_smoothed_loss

OPTIONS = TrainConfig(lr=1e-5)  # nspec's defaults, at a rate at which random text does not diverge


class Clock:
    """Seconds of each part of a step: the time between a mark and the one before it, from when the clock is made.

    Args:
        device: that computes.
        synchronized: wait for the device at each mark. Needed on a GPU, where a part else ends when it is enqueued, and
            too slow for a step whose total is wanted too.
    """

    def __init__(self, device: torch.device, synchronized: bool = False) -> None:
        self._device, self._synchronized = device, synchronized
        self.parts = dict.fromkeys(STEP_PARTS, 0.0)
        self._last = self._now()

    def mark(self, part: str) -> None:
        """Ends a part, which may have several pieces."""
        now = self._now()
        self.parts[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._synchronized:
            synchronize(self._device)
        return time.perf_counter()


class System:
    """One way to train: a model of its own, an optimiser, and how it is switched to a task.

    Args:
        kind: ``dense``, ``release``, ``forward``, ``update``; or ``no feed-forward``, a dense model whose feed-forward
            pairs are skipped, which shows what share of a step is theirs.
        model: the plain model, which is copied.
        masks: of all tasks; not for a dense model.
        optimizer: ``adamw`` (PyTorch's, fused) or ``row_sparse_adamw`` (ours).
        dtype: float32, or bfloat16 under autocast.

    Attributes:
        seconds: what putting the masks on the model took.
    """

    def __init__(
        self, kind: str, model: nn.Module, masks: Masks, optimizer: str = "adamw", dtype: torch.dtype = torch.float32
    ) -> None:
        self.kind, self.optimizer_name, self.dtype = kind, optimizer, dtype
        self.model = copy.deepcopy(model)
        self.device = next(self.model.parameters()).device
        ours = nspec.NeuronMasks(masks) if kind in ("forward", "update") else None
        began = time.perf_counter()
        if ours is not None:
            nspec.specialize(self.model, ours, mode=kind)  # type: ignore[arg-type]
        elif kind == "release":
            release.mask_weights(self.model, masks)
        elif kind == "no feed-forward":
            for name in [name for name, _ in model.named_modules() if name.endswith((".fc1", ".fc2"))]:
                self.model.set_submodule(name, nn.Identity())
        synchronize(self.device)
        self.seconds = time.perf_counter() - began
        self.optimizer = build_optimizer(self.model, replace(OPTIONS, optimizer=optimizer))

    def switched(self, tasks: Tasks) -> contextlib.AbstractContextManager[None]:
        """Within the block the model is switched to a task, or to the task of each sentence."""
        if self.kind in ("forward", "update"):
            return nspec.task(self.model, tasks, batch_dim=0)
        return release.weights_masked(self.model, tasks) if self.kind == "release" else contextlib.nullcontext()

    def loss(self, batch: Batch) -> Tensor:
        """The training loss, in nats per target token."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(**inputs).logits
        return label_smoothed_loss(logits, batch["labels"], OPTIONS.label_smoothing, batch["labels"].numel())

    def step(self, batch: Batch, tasks: Tasks, clock: Clock | None = None) -> None:
        """An update as nspec's trainer does it; clipping the gradient's norm counts as the optimiser's."""
        mark = (lambda part: None) if clock is None else clock.mark
        with self.switched(tasks):
            mark("task switch")
            loss = self.loss(batch)
            mark("forward")
            loss.backward()
            mark("backward")
        mark("task switch")
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIONS.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")

    def gradients(self, batch: Batch, tasks: Tasks) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradient of every parameter, without dropout; the parameters stay as they are."""
        self.model.eval()
        with self.switched(tasks):
            loss = self.loss(batch)
            loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        self.model.train()
        return loss.detach(), found


def held_bytes(model: nn.Module) -> int:
    """Bytes of the masks of all tasks that a model holds: every tensor that its layers keep beyond their parameters.

    To be asked before the model is used. Ours copies what a task needs to a GPU when the task is used first: there it
    is what all tasks come to in the end.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def walk(thing: Any) -> None:
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, (Mapping, list, tuple)):
            for one in thing.values() if isinstance(thing, Mapping) else thing:
                walk(one)
        elif not isinstance(thing, nn.Module) and type(thing).__module__.startswith("nspec."):
            walk(vars(thing))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            walk(vars(module))
    return sum(seen.values())


def mask_bytes(kind: str, shape: Shape, model: nn.Module, masks: Masks) -> int:
    """Bytes that the masks of these tasks take, in a model that shares its parameters with ``model``."""
    if kind == "release":
        return release_bytes(shape, len(masks))
    if kind == "dense":
        return 0
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    return held_bytes(nspec.specialize(shared, nspec.NeuronMasks(masks), mode=kind))  # type: ignore[arg-type]


def release_bytes(shape: Shape, tasks: int) -> int:
    """Bytes of the release's masks: one for each element of fc1.weight, layer and task."""
    return tasks * len(shape.layers) * shape.d_ff * shape.d_model


def free(device: torch.device) -> None:
    """Gives memory of models that are gone back to a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
