"""Switching a specialised model between tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from nspec.nn.batch import TaskBatch
from nspec.nn.switched import TaskSwitched

from .layers import nearest


def specialized_layers(model: nn.Module) -> list[TaskSwitched]:
    """The modules of ``model`` that know tasks, also through wrappers (DistributedDataParallel, torch.compile).

    Raises:
        ValueError: the model is not specialised.
    """
    layers: list[TaskSwitched] = [module for module in model.modules() if isinstance(module, TaskSwitched)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not specialised: call nspec.specialize(model, masks) first")
    return layers


def set_task(model: nn.Module, task: str | Sequence[str] | None, *, batch_dim: int = 0) -> None:
    """Switches the model to the neurons of ``task``, or of the task of each sentence; None computes the dense model.

    Args:
        model: specialised.
        task: a name; or for batches of several tasks a sequence with the name of each sentence, in any order. A layer's
            input may then have ``n * k`` rows for n sentences, those of a sentence together: beams, or a model that
            flattens a batch to tokens.
        batch_dim: with a sequence, the dimension of the layers' input along which sentences lie; 1 for models that keep
            time first.

    Raises:
        ValueError: the model is not specialised, has no masks of that task, the sequence is empty, or ``batch_dim`` is
            negative.
        TypeError: the task is neither a string nor a sequence of strings.
    """
    layers = specialized_layers(model)
    switch = _checked(task, batch_dim, layers[0].tasks)
    for layer in layers:
        layer.set_task(switch)


def _checked(task: Any, batch_dim: int, known: list[str]) -> str | TaskBatch | None:
    if task is None or isinstance(task, str):
        names = [] if task is None else [task]
    elif isinstance(task, Sequence):
        names = list(task)
        if not names:
            raise ValueError("the list of tasks is empty, expected the task of each sentence")
        for place, name in enumerate(names):
            if not isinstance(name, str):
                raise TypeError(f"the task of sentence {place} is {name!r}, expected the name of a task")
        if batch_dim < 0:
            raise ValueError(f"batch_dim is {batch_dim}, expected 0 or more")
    else:
        raise TypeError(f"task is {task!r}, expected the name of a task or None, or a name for each sentence")
    for name in names:
        if name not in known:
            raise ValueError(f"there are no masks of task {name!r}; {nearest(name, known)}")
    return task if task is None or isinstance(task, str) else TaskBatch(names, batch_dim)


@contextlib.contextmanager
def task(model: nn.Module, name: str | Sequence[str] | None, *, batch_dim: int = 0) -> Iterator[None]:
    """Within the block the model is switched to task ``name``; after it, to what it was before.

    A sequence gives the task of each sentence of a batch; see :func:`set_task`. The backward pass may run after the
    block: activation checkpointing computes the forward pass again with the neurons that it used
    (``nspec.checkpoint_contexts`` where one backward pass holds several tasks).

    Example:
        with nspec.task(model, "en-de"):
            model(**batch).loss.backward()

    Raises:
        ValueError: as in :func:`set_task`.
        TypeError: as in :func:`set_task`.
    """
    layers = specialized_layers(model)
    before = [layer.state() for layer in layers]
    set_task(model, name, batch_dim=batch_dim)
    try:
        yield
    finally:
        for layer, state in zip(layers, before):
            layer.restore(state)


@contextlib.contextmanager
def task_by_layer(model: nn.Module, task_of: Callable[[str], str | None]) -> Iterator[None]:
    """Within the block each layer is switched to a task of its own; after it, to what it was before.

    So a model can compute with the encoder's neurons of one task and the decoder's of another.

    Args:
        model: specialised.
        task_of: gives the task of a layer, or None for the dense one, by the layer's qualified name in ``model``.

    Raises:
        ValueError: the model is not specialised, or a layer does not know its task; nothing is switched then.
    """
    specialized_layers(model)  # raises where there are none
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TaskSwitched)}
    tasks = {name: _checked(task_of(name), 0, layer.tasks) for name, layer in layers.items()}
    before = {name: layer.state() for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_task(tasks[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.restore(before[name])


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """A ``context_fn`` for ``torch.utils.checkpoint``: what is computed again uses the task of its forward pass.

    Needed where one backward pass holds forward passes of several tasks under the same layers, and where layers are
    compiled inside a checkpoint; elsewhere the layers find the task by themselves. Without reentrance only.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"a": {"0": torch.tensor([True, False])}}))
        >>> options = {"use_reentrant": False, "context_fn": nspec.checkpoint_contexts(model)}
        >>> with nspec.task(model, "a"):
        ...     y = torch.utils.checkpoint.checkpoint(model, torch.ones(1, 1), **options)
        >>> y.sum().backward()

    Raises:
        ValueError: the model is not specialised.
    """
    layers = specialized_layers(model)

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _switched(layers, [layer.state() for layer in layers])

    return contexts


@contextlib.contextmanager
def _switched(layers: list[TaskSwitched], states: list[Any]) -> Iterator[None]:
    before = [layer.state() for layer in layers]
    for layer, state in zip(layers, states):
        layer.restore(layer.again(state))
    try:
        yield
    finally:
        for layer, state in zip(layers, before):
            layer.restore(state)
