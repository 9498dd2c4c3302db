"""What a layer offers that computes something else for each task, so that ``nspec.task`` can switch it."""

from __future__ import annotations

from typing import Any

from .batch import TaskBatch


class TaskSwitched:
    """A mixin for modules that ``nspec.task`` and ``nspec.set_task`` switch, whatever it is that they do for a task.

    Masked feed-forward layers, adapters and layers with masked weights are of this kind. A model may hold several, which
    then know the same tasks.
    """

    @property
    def tasks(self) -> list[str]:
        """The tasks that the layer knows."""
        raise NotImplementedError

    @property
    def decodes_by_task(self) -> bool:
        """Whether the forward pass depends on the task, so that a translation must be made under it."""
        raise NotImplementedError

    def set_task(self, task: str | TaskBatch | None) -> None:
        """Switches to a task, or to the task of each sentence of a batch; None switches off what depends on it."""
        raise NotImplementedError

    def state(self) -> Any:
        """What the layer is switched to, for :meth:`restore`."""
        raise NotImplementedError

    def restore(self, state: Any) -> None:
        """Switches back to an earlier state."""
        raise NotImplementedError

    def again(self, state: Any) -> Any:
        """A state under which a backward pass may compute the forward pass again (activation checkpointing)."""
        return state
