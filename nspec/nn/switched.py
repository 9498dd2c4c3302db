"""What a layer offers that computes something else for each task, so that ``nspec.task`` can switch it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch

from .batch import TaskBatch
from .recompute import backward_pass


class Block:
    """Who switched the layers of a model: a ``nspec.task`` block, or a call of ``nspec.set_task`` until the next.

    A model is switched by one thread at a time, since a pass goes through layer after layer: another thread that switched
    it, or ran it meanwhile, would compute half of one task and half of another.

    Attributes:
        thread: the thread that entered the block.
        lasting: made by ``set_task``: other threads may run the model, as nothing switches it back.
        before: of each layer, by its id: the layer, its state and its block from before.
    """

    def __init__(self, lasting: bool) -> None:
        self.thread, self.lasting = threading.current_thread(), lasting
        self.before: dict[int, tuple[TaskSwitched, Any, Block | None]] = {}
        self.open = True

    def enter(self, layers: Iterable[TaskSwitched]) -> None:
        """Remembers what the layers are switched to, and holds them."""
        for layer in layers:
            self.before[id(layer)] = layer, layer.state(), layer._block
            layer.hold(self)

    def leave(self) -> None:
        """Switches the layers back; those that a block holds which was entered later wait for it."""
        self.open = False
        for key, (layer, _, _) in self.before.items():
            while (block := layer._block) is not None and not block.open:
                _, state, outer = block.before[key]
                layer.hold(outer)
                layer.restore(state)

    def elsewhere(self) -> bool:
        """Whether it belongs to another thread, which is still running."""
        return self.thread is not threading.current_thread() and self.thread.is_alive()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a model is in no block


class TaskSwitched:
    """A mixin for modules that ``nspec.task`` and ``nspec.set_task`` switch, whatever it is that they do for a task.

    Masked feed-forward layers, adapters and layers with masked weights are of this kind. A model may hold several, which
    then know the same tasks.
    """

    _block: Block | None = None

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

    def hold(self, block: Block | None) -> None:
        """Notes the block that switches the layer now; None: nobody does."""
        self.__dict__.pop("_block", None)
        if block is not None:
            self.__dict__["_block"] = block

    def check_thread(self) -> None:
        """For the beginning of a forward pass: raises RuntimeError inside a ``nspec.task`` block of another thread.

        Replicas of ``nn.DataParallel`` and what a backward pass computes again run in threads of PyTorch.
        """
        if torch.compiler.is_compiling():
            return
        block = self._block
        if block is None or block.lasting or not block.open or not block.elsewhere():
            return
        if backward_pass() < 0 and not getattr(self, "_is_replica", False):
            raise RuntimeError(
                f"thread {threading.current_thread().name} runs a model that thread {block.thread.name} has switched with "
                "nspec.task: a model is switched by one thread at a time. Enter nspec.task in the thread that runs the "
                "model, and hold a lock around it; or set one task for all threads (nspec.set_task), run sentences of "
                "several tasks in one batch (nspec.task(model, [names])), or give each task a model of its own "
                "(nspec.merge(model, name))"
            )
