"""What a layer offers that computes something else for each task, so that ``nspec.task`` can switch it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .batch import TaskBatch
from .recompute import backward_pass
from .state import SwitchedTo


class Holder(NamedTuple):
    """Who switches or runs a model: a thread, and within it a task of asyncio."""

    thread: threading.Thread
    coroutine: Any

    @classmethod
    def present(cls) -> Holder:
        """Whoever runs this code."""
        coroutine = None
        with contextlib.suppress(RuntimeError):  # no loop is running here
            coroutine = asyncio.current_task()
        return cls(threading.current_thread(), coroutine)

    def elsewhere(self) -> bool:
        """Whether it is not who runs this code, and still there."""
        if self.thread is not threading.current_thread():
            return self.thread.is_alive()
        if self.coroutine is None or self.coroutine.done():
            return False
        return Holder.present().coroutine is not self.coroutine

    def __str__(self) -> str:
        within = "" if self.coroutine is None else f" (task {self.coroutine.get_name()} of asyncio)"
        return f"thread {self.thread.name}{within}"


class Switching:
    """Who switched the layers of a model: a ``nspec.task`` block, or a call of ``nspec.set_task`` until the next.

    A model is switched by one thread at a time, since a pass goes through layer after layer: another thread that switched
    it, or ran it meanwhile, would compute half of one task and half of another. The same of tasks of asyncio.

    Attributes:
        holder: who entered the block.
        lasting: made by ``set_task``: others may run the model, as nothing switches it back.
        ahead: made while a loader fetched the batch after the one that is run next.
        before: of each layer, by its id: the layer, its state and its block from before.
        open: whether it has not ended.
    """

    def __init__(self, lasting: bool, ahead: bool = False) -> None:
        self.holder, self.lasting, self.ahead = Holder.present(), lasting, ahead
        self.before: dict[int, tuple[TaskSwitched, Any, Switching | None]] = {}
        self.open = True

    def enter(self, layers: Iterable[TaskSwitched]) -> None:
        """Remembers what the layers are switched to, and holds them."""
        layers = list(layers)
        count_switch(layers)
        for layer in layers:
            self.before[id(layer)] = layer, layer.switched_to(), layer._nspec.block
            layer.hold(self)

    def leave(self) -> None:
        """Switches the layers back; those that a block holds which was entered later wait for it."""
        self.open = False
        count_switch(layer for layer, _, _ in self.before.values())
        for key, (layer, _, _) in self.before.items():
            # A layer that was despecialised within the block has none.
            while (
                (kept := layer.__dict__.get("_nspec")) is not None
                and (block := kept.block) is not None
                and not block.open
            ):
                _, state, outer = block.before[key]
                layer.hold(outer)
                layer.switch(state)

    def elsewhere(self) -> bool:
        """Whether it belongs to another thread, or task of asyncio, that is still running."""
        return self.holder.elsewhere()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a model is in no block


def fetches_ahead() -> bool:
    """Whether this code is called by a loader of accelerate, which fetches a batch before it gives the one before."""
    frame = sys._getframe(1) if "accelerate" in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.data_loader":
        frame = frame.f_back
    return frame is not None


class _Traced:
    """How often a specialised layer was compiled, in this process."""

    calls = 0


traced = _Traced()


def note_traced() -> bool:
    """Notes that a specialised layer is compiled; compiled code does not tell when it runs."""
    traced.calls += 1
    return True


# It runs while the graph is made, as with torch.compiler.assume_constant_result, which would load the compiler.
note_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Shared:
    """What the specialised layers of a model have in common.

    Attributes:
        told: whether somebody was warned that a training pass has no task.
        hooked: whether somebody was warned that hooks do not get activations.
        called: the names of the layers that ran, outside of compiled code.
        sentences_first: the names of the layers whose inputs have shown that sentences lie along their first dimension.
        ended: how many ``nspec.task`` blocks ended, and switches by ``set_task``; ``missed`` whether somebody was warned of
            layers that never ran.
        traced: how often specialised layers of any model had been compiled before.
        switches: how often the layers were switched, and ``by`` the thread that did so last.
    """

    def __init__(self) -> None:
        self.told, self.hooked, self.missed, self.switches, self.by = False, False, False, 0, 0
        self.called: set[str] = set()
        self.sentences_first: set[str] = set()
        self.ended, self.traced = 0, traced.calls


def count_switch(layers: Iterable[TaskSwitched]) -> None:
    """Notes that this thread switches the layers, before it does."""
    of_models: set[Shared | None] = {layer._nspec.shared for layer in layers if "_nspec" in layer.__dict__}
    for shared in of_models:
        if shared is not None:
            shared.switches, shared.by = shared.switches + 1, threading.get_ident()


class _Passes(threading.local):
    """In each thread, of each model that it ran: the number of switches that its last layer saw."""

    def __init__(self) -> None:
        self.of: dict[Shared, int] = {}


_passes = _Passes()


class TaskSwitched:
    """A mixin for modules that ``nspec.task`` and ``nspec.set_task`` switch, whatever it is that they do for a task.

    A class says what it knows and what it computes with for a task; its ``forward`` asks :meth:`begin`.

    Masked feed-forward layers, adapters and layers with masked weights are of this kind. A model may hold several, which
    then know the same tasks.
    """

    _nspec: Any

    @property
    def tasks(self) -> list[str]:
        """The tasks that the layer knows."""
        raise NotImplementedError

    def knows(self, task: str | None) -> bool:
        """Whether the layer knows the task. None: whether a batch of several tasks may have sentences without one."""
        return task in self.tasks

    @property
    def decodes_by_task(self) -> bool:
        """Whether the forward pass depends on the task, so that a translation must be made under it."""
        raise NotImplementedError

    @property
    def task(self) -> Any:
        """The current task, or the task of each sentence of a batch as a tuple; None: none."""
        return self._nspec.task

    def use_of(self, tasks: tuple[str | None, ...]) -> Any:
        """What the layer computes with for a task, or for the different tasks of a batch."""
        raise NotImplementedError

    def set_task(self, task: str | TaskBatch | None) -> None:
        """Switches to a task, or to the task of each sentence of a batch; None switches off what depends on it."""
        if isinstance(task, TaskBatch):
            task = task.along(getattr(self._nspec, "batch_dim", None))
            self.switch(SwitchedTo(task.tasks, self.use_of(task.names), task, backward_pass()))
        else:
            self.switch(SwitchedTo(task, None if task is None else self.use_of((task,)), None, backward_pass()))

    def begin(self) -> Any:
        """Begins a forward pass: what it uses, and the batch.

        Raises:
            RuntimeError: see :meth:`check_thread`.
        """
        self.check_thread()
        return self._nspec.current()

    def switch(self, to: SwitchedTo) -> None:
        """Switches to what a task, a batch or an earlier state says."""
        self._nspec.switch(to)

    def switched_to(self) -> SwitchedTo:
        """What the layer is switched to, for :meth:`switch`; layers of bitsandbytes have a ``state``."""
        to: SwitchedTo = self._nspec.switched_to()
        return to

    def hold(self, block: Switching | None) -> None:
        """Notes the block that switches the layer now; None: nobody does."""
        self._nspec.block = block

    def check_thread(self) -> None:
        """For the beginning of a forward pass: raises RuntimeError inside a ``nspec.task`` block of another thread.

        And where ``nspec.set_task`` was called for the next batch already.

        Replicas of ``nn.DataParallel`` and what a backward pass computes again run in threads of PyTorch.
        """
        if torch.compiler.is_compiling():
            return
        block = self._nspec.block
        self._check_same_pass()
        if block is not None and block.ahead and not fetches_ahead():
            raise RuntimeError(
                "nspec.set_task was called while a batch was fetched, and accelerate's loader fetches one ahead: the task "
                "is that of the next batch. Leave it in the batch, and set it where the batch is used: "
                "nspec.TaskTrainerMixin does both, nspec.task_collator the first"
            )
        if block is None or block.lasting or not block.open or not block.elsewhere():
            return
        if not self._in_other_thread_of_torch():
            raise RuntimeError(
                f"{Holder.present()} runs a model that {block.holder} has switched with nspec.task: a model is switched by "
                "one thread at a time. Enter nspec.task in the thread that runs the model, and hold a lock around it; or "
                "set one task for all threads (nspec.set_task), run sentences of several tasks in one batch "
                "(nspec.task(model, [names])), or give each task a model of its own (nspec.merge(model, name))"
            )

    def _in_other_thread_of_torch(self) -> bool:
        return backward_pass() >= 0 or getattr(self, "_is_replica", False)

    def _check_same_pass(self) -> None:
        """Raises RuntimeError where another thread has switched the model since the last layer of this pass."""
        shared = self._nspec.shared
        if shared is None:
            return
        passes = _passes.of
        before = passes.get(shared)
        if before == shared.switches:
            return
        mine = before is None or self._nspec.first or shared.by == threading.get_ident()
        if not mine and not self._in_other_thread_of_torch():
            del passes[shared]
            raise RuntimeError(
                f"{Holder.present()} was in the middle of a pass when another thread switched the model to another task: "
                "wait for the passes of other threads before a switch, run sentences of several tasks in one batch "
                "(nspec.task(model, [names])), or give each task a model of its own (nspec.merge(model, name))"
            )
        passes[shared] = shared.switches
