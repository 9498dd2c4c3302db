"""Switching a specialised model between tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from nspec.nn.ffn import TaskLinear

from .layers import nearest


def specialized_layers(model: nn.Module) -> list[TaskLinear]:
    """The specialised fc1 modules of ``model``, also through wrappers (DistributedDataParallel, torch.compile).

    Raises:
        ValueError: the model is not specialised.
    """
    layers = [module for module in model.modules() if isinstance(module, TaskLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not specialised: call nspec.specialize(model, masks) first")
    return layers


def set_task(model: nn.Module, task: str | None) -> None:
    """Switches the model to the neurons of ``task``; None computes the dense model.

    Raises:
        ValueError: the model is not specialised, or has no masks of that task.
        TypeError: the task is not a string.
    """
    if task is not None and not isinstance(task, str):
        raise TypeError(f"task is {task!r}, expected the name of a task or None")
    layers = specialized_layers(model)
    if task is not None and task not in layers[0].tasks:
        raise ValueError(f"there are no masks of task {task!r}; {nearest(task, layers[0].tasks)}")
    for layer in layers:
        layer.set_task(task)


@contextlib.contextmanager
def task(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block the model is switched to task ``name``; after it, to what it was before.

    Run the backward pass inside the block too: activation checkpointing computes the forward pass again there.

    Example:
        with nspec.task(model, "en-de"):
            model(**batch).loss.backward()

    Raises:
        ValueError: the model is not specialised, or has no masks of that task.
    """
    before = specialized_layers(model)[0].task
    set_task(model, name)
    try:
        yield
    finally:
        set_task(model, before)
