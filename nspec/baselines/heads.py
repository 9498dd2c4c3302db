"""Attention heads of each task: the others' outputs are zero before they are projected together, in any ``nn.Module``."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from nspec.nn.batch import TaskBatch, reorder
from nspec.nn.state import LayerState
from nspec.nn.switched import TaskSwitched
from nspec.specialization.layers import nearest
from nspec.specialization.masks import NeuronMasks

_HANDLE = "_heads_hook"  # on an out_proj: what takes the hook off


class TaskHeads(nn.Module, TaskSwitched):
    """Keeps the heads of the current task in what an attention module puts out; without a task all of them.

    It has no parameters, and its state dict is empty. A batch may hold several tasks (:class:`~nspec.nn.batch.TaskBatch`).

    Args:
        kept: the heads of each task, bool ``[heads]``.

    Raises:
        ValueError: no task.

    Example:
        >>> heads = TaskHeads({"en-de": torch.tensor([True, False])})
        >>> with nspec.task(heads, "en-de"):
        ...     heads(torch.ones(1, 4)).tolist()
        [[1.0, 1.0, 0.0, 0.0]]
    """

    kept: Tensor

    def __init__(self, kept: dict[str, Tensor]) -> None:
        super().__init__()
        if not kept:
            raise ValueError("no task: expected the heads of one or more")
        self._tasks = list(kept)
        self.register_buffer("kept", torch.stack([*kept.values()]), persistent=False)  # moves with the model
        self._nspec = LayerState()

    decodes_by_task = True  # masked heads are part of the forward pass

    @property
    def tasks(self) -> list[str]:
        """The tasks that have heads."""
        return list(self._tasks)

    def knows(self, task: str | None) -> bool:
        """Whether there are heads of the task. None, with all heads, may be among the tasks of a batch."""
        return task is None or task in self._tasks

    def use_of(self, tasks: tuple[Any, ...]) -> str | None:
        """The name of one task.

        Raises:
            ValueError: a task without heads; nothing is switched then.
        """
        for name in tasks:
            if not self.knows(name):
                raise ValueError(f"there are no heads of task {name!r}; {nearest(name, self._tasks)}")
        return sys.intern(tasks[0]) if len(tasks) == 1 and tasks[0] is not None else None

    @torch.compiler.disable  # a graph for each task would reach the limit of recompilation
    def forward(self, x: Tensor) -> Tensor:
        """``x [..., heads * size]``, sentences along its first dimension, with zeros for the heads that are not kept.

        Raises:
            ValueError: the rows of ``x`` do not fit the tasks of the batch.
        """
        name, batch = use = self.begin()
        if name is None and batch is None:
            (marked,) = self._nspec.note(use, x)
            return x if marked is x else marked.clone()  # a mark is a view, which the model may not write into
        (x,) = self._nspec.note(use, x)
        return self._only(x, name) if batch is None else self._by_sentence(x, batch)

    def _only(self, x: Tensor, task: str | None) -> Tensor:
        if task is None:
            return x
        dropped = ~self.kept[self._tasks.index(task)]
        parts = x.unflatten(-1, (len(dropped), -1))
        return parts.masked_fill(dropped[:, None], 0).flatten(-2)

    def _by_sentence(self, x: Tensor, batch: TaskBatch) -> Tensor:
        batch.check(x)
        if batch.single:
            return self._only(x, batch.names[0])
        order, inverse, _ = batch.layout(x)
        tokens, bounds = reorder(x.reshape(-1, x.shape[-1]), order, inverse), batch.bounds(x)
        parts = [self._only(tokens[start:stop], name) for name, start, stop in zip(batch.names, bounds, bounds[1:])]
        return reorder(torch.cat(parts), inverse, order).view(x.shape)


def mask_heads(model: nn.Module, masks: NeuronMasks) -> nn.Module:
    """Makes attention use the heads of the current task alone, in place. ``nspec.task`` switches it.

    A head that is not kept gives zero, in training and in evaluation, and its part of the projections gets no gradient from
    the task. Parameters and state-dict keys stay; each ``out_proj`` gets a submodule ``heads`` without any.

    Args:
        model: any module whose attention modules call an ``out_proj``; not yet wrapped or compiled.
        masks: bool ``[heads]`` of each task and attention module, by its qualified name, as
            :meth:`nspec.analysis.heads.HeadImportance.largest` gives them.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an attention module that the model does not have, that calls no ``out_proj``, or that has another number
            of heads; a task that keeps none of a module's; heads are masked already; the model knows other tasks.
        TypeError: ``masks`` is not a ``NeuronMasks``.

    Example:
        >>> attention = nn.Module()
        >>> attention.out_proj, attention.num_heads = nn.Linear(4, 4), 2
        >>> model = nn.ModuleDict({"attention": attention})
        >>> model = mask_heads(model, nspec.NeuronMasks({"en-de": {"attention": torch.tensor([True, False])}}))
        >>> with nspec.task(model, "en-de"):
        ...     attention.out_proj(torch.ones(1, 4)).sum().backward()
        >>> attention.out_proj.weight.grad[0].tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    if not isinstance(masks, NeuronMasks):
        raise TypeError(f"masks is a {type(masks).__name__}, expected nspec.NeuronMasks with bool [heads]")
    for module in model.modules():
        if isinstance(module, TaskHeads):
            raise ValueError("the model has masked heads already: call unmask_heads(model) first")
        if isinstance(module, TaskSwitched) and set(module.tasks) != set(masks.tasks):
            differ = ", ".join(sorted(set(module.tasks) ^ set(masks.tasks)))
            raise ValueError(f"the model and the masks of heads are of different tasks: {differ}")
    found = [(_projection(model, name, masks), name) for name in masks.layers]
    for projection, name in found:
        heads = TaskHeads({task: masks[task][name] for task in masks.tasks})
        projection.add_module("heads", heads.to(projection.weight.device).train(projection.training))
        projection.__dict__[_HANDLE] = projection.register_forward_pre_hook(_keep)
    return model


def _projection(model: nn.Module, name: str, masks: NeuronMasks) -> Any:
    """The ``out_proj`` of an attention module."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"masks name attention {name!r}, which the model does not have; {nearest(name, modules)}")
    projection: Any = getattr(modules[name], "out_proj", None)
    width, heads = getattr(projection, "in_features", None), len(masks[masks.tasks[0]][name])
    if not isinstance(width, int) or isinstance(modules[name], nn.MultiheadAttention):  # that one does not call it
        raise ValueError(f"{name} is a {type(modules[name]).__name__}, expected attention that calls an out_proj")
    number = getattr(modules[name], "num_heads", heads)
    if number != heads or width % heads:
        raise ValueError(f"masks are of another model: {name} has {heads} heads in the masks, {number} in the model")
    if none := [task for task in masks.tasks if not bool(masks[task][name].any())]:
        raise ValueError(f"{none[0]} keeps no head of {name}, expected one or more")
    return projection


def _keep(projection: Any, inputs: Any) -> Any:
    """The hook. At module level, so that a model with it can be pickled and copied."""
    return (projection.heads(inputs[0]), *inputs[1:])


def merge_heads(model: nn.Module, task: str) -> nn.Module:
    """A plain copy of the model that computes what ``task`` computes: the columns of ``out_proj`` of other heads are zero.

    Raises:
        ValueError: no heads are masked, or there are none of that task.

    Example:
        >>> attention = nn.Module()
        >>> attention.out_proj, attention.num_heads = nn.Linear(4, 4), 2
        >>> model = nn.ModuleDict({"attention": attention})
        >>> model = mask_heads(model, nspec.NeuronMasks({"en-de": {"attention": torch.tensor([True, False])}}))
        >>> merge_heads(model, "en-de")["attention"].out_proj.weight[0, 2:].tolist()
        [0.0, 0.0]
    """
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for module in merged.modules():
            if _HANDLE not in module.__dict__:
                continue
            projection: Any = module
            heads, weight = projection.heads, projection.weight
            if task not in heads.tasks:
                raise ValueError(f"there are no heads of task {task!r}; {nearest(task, heads.tasks)}")
            kept = heads.kept[heads.tasks.index(task)].to(weight.device)
            weight.unflatten(1, (len(kept), -1)).masked_fill_(~kept[:, None], 0)
    return unmask_heads(merged)


def unmask_heads(model: nn.Module) -> nn.Module:
    """Makes attention use all heads again, in place.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: none are masked.
    """
    masked = [module for module in model.modules() if _HANDLE in module.__dict__]
    if not masked:
        raise ValueError(f"{type(model).__name__} has no masked heads: call mask_heads(model, masks) first")
    for module in masked:
        module.__dict__.pop(_HANDLE).remove()
        del module.heads
    return model
