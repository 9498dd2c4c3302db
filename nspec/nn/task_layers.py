"""Layers that know the active neurons of several tasks, and are switched between them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .active import ActiveSet
from .batch import check_sentences
from .masked_linear import Masked, MaskedLinear, Mode, NeuronState
from .packed import PackedWeights
from .recompute import Use, backward_pass
from .switched import Shared, TaskSwitched, note_traced

_STACKS = 16  # sets of several tasks kept for each layer; a training that mixes tasks comes back to the same ones


class TaskLayerState(NeuronState):
    """What is kept on a layer that knows tasks.

    Attributes:
        name: of the layer in its model, for messages.
        sets: the active neurons of each task; those of both projections of a gated block are one dictionary.
        stacks: those of several tasks as one.
        gated: whether it is one of the two projections of a gated block, or both in one.
        routed: whether a router chooses the tokens of the layer, so that their sentences are not known.
        batch_dim: the dimension of sentences in the layer's input, where the model says it.
        flattens: whether the model is known to flatten a batch to tokens before the layer.
        packed: in mode ``forward``, packed weights.
        beside: on the first layer of a block, the names that the module around the block, up (None: there is none) and fc2
            had in the model that was specialised.
    """

    beside: tuple[str | None, ...] | None = None

    def __init__(self, mode: Mode, *, gated: bool = False, doubled: bool = False, plain: Any = None) -> None:
        super().__init__(mode)
        self.gated, self.doubled, self.plain, self.name = gated, doubled, plain, "fc1"
        self.sets: dict[str, ActiveSet] = {}
        self.stacks: dict[tuple[str | None, ...], ActiveSet] = {}
        self.routed, self.flattens = False, False
        self.batch_dim: int | None = None
        self.packed = PackedWeights()

    def replica(self) -> Any:
        """The state of a replica, with weights of its own."""
        other = super().replica()
        other.packed = PackedWeights()
        return other


class TaskLayer(Masked, TaskSwitched):
    """A masked layer that knows the active sets of several tasks. Layers are turned into one of its kinds in place."""

    _nspec: TaskLayerState

    @property
    def qualified_name(self) -> str:
        """The name of the layer in its model."""
        return self._nspec.name

    @property
    def gated(self) -> bool:
        """Whether it is one of the two projections of a gated block, or both in one."""
        return self._nspec.gated

    def add_tasks(
        self,
        masks: dict[str, Tensor],
        name: str = "fc1",
        *,
        shared: Shared | None = None,
        first: bool = True,
        routed: bool = False,
        batch_dim: int | None = None,
        flattens: bool = False,
        with_layer: TaskLayer | None = None,
    ) -> None:
        """Sets the active neurons of each task, bool ``[out_features]``.

        Args:
            masks: of each task.
            name: of the layer in its model, for messages.
            shared: what the layers of a model have in common.
            first: whether it is the first of them.
            routed: whether a router chooses the tokens of the layer, so that their sentences are not known.
            batch_dim: the dimension of sentences in the layer's input, where the model says it.
            flattens: whether the model is known to flatten a batch to tokens before the layer.
            with_layer: another projection of the same block, whose sets are used and masks ignored.
        """
        kept = self._nspec
        if with_layer is not None:
            kept.sets, kept.stacks = with_layer._nspec.sets, with_layer._nspec.stacks
        else:
            twice = kept.doubled and self.mode == "update"
            kept.sets = {task: ActiveSet(mask.repeat(2) if twice else mask) for task, mask in masks.items()}
        kept.name, kept.shared, kept.first = name, shared or Shared(), first
        kept.routed, kept.batch_dim, kept.flattens = routed, batch_dim, flattens

    @property
    def tasks(self) -> list[str]:
        """The tasks that this layer has masks of."""
        return list(self._nspec.sets)

    def knows(self, task: str | None) -> bool:
        """Whether the layer has a mask of the task. None, with all neurons, may be among the tasks of a batch."""
        return task is None or task in self._nspec.sets

    @property
    def decodes_by_task(self) -> bool:
        """In mode ``forward`` alone: in mode ``update`` the forward pass is dense."""
        return self.mode == "forward"

    def use_of(self, tasks: tuple[str | None, ...]) -> ActiveSet:
        """The sets of several tasks as one, all neurons for None; the set itself of a single one."""
        if len(tasks) == 1 and tasks[0] is not None:
            return self._nspec.sets[tasks[0]]
        stack = self._nspec.stacks.get(tasks)
        if stack is None:
            if len(self._nspec.stacks) >= _STACKS:
                del self._nspec.stacks[next(iter(self._nspec.stacks))]
            sets = [self._every() if name is None else self._nspec.sets[name] for name in tasks]
            if not self.weight.is_meta:  # weights that are offloaded come when the layer runs
                sets = [one.on(self.weight.device) for one in sets]
            self._nspec.stacks[tasks] = stack = ActiveSet.stack(sets)
        return stack

    def _every(self) -> ActiveSet:
        neurons = len(next(iter(self._nspec.sets.values())).active)
        return ActiveSet(torch.ones(neurons, dtype=torch.bool, device="cpu"))

    def _begin(self, x: Tensor) -> Use:
        self.check_thread()
        if torch.compiler.is_compiling():
            note_traced()
        else:
            self._nspec.shared.called.add(self._nspec.name)
        if self._nspec.batch is not None:
            check_sentences(x, self._nspec.batch, self._nspec)
        use = super()._begin(x)
        if use[0] is None and not torch.compiler.is_compiling() and self._trains_untold():
            self._nspec.shared.told = True
            warnings.warn(
                f"{self.qualified_name} is specialised, and a training pass runs without a task: it is dense, and every "
                "row is trained. Set the task of each batch (with nspec.task(model, name)), or say that the base is meant "
                "(with nspec.task(model, None)). This is said once",
                stacklevel=2,
            )
        return use

    def _trains_untold(self) -> bool:
        """Whether this is a training pass of which nobody has said that it has no task."""
        if self._nspec.shared.told or not self.training:
            return False
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        held = self._nspec.block is not None and self._nspec.block.open
        return trains and not held and backward_pass() < 0


class TaskLinear(TaskLayer, MaskedLinear):
    """A linear layer of that kind."""


class TransposedFeatures:
    """The sizes of a layer whose weight is ``[in_features, out_features]``."""

    transposed = True
    weight: Tensor

    @property
    def in_features(self) -> int:
        """The size of each input."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """The number of neurons."""
        return self.weight.shape[1]


class TaskConv1D(TransposedFeatures, TaskLayer):
    """The same of a ``Conv1D``, a linear layer with the weight transposed."""
