"""Activation checkpointing: the forward pass that is computed again in a backward pass uses the neurons of the first.

By then the model may have been switched to another task. A layer that runs inside a backward pass therefore looks up
which of its forward passes is computed again:

* ``use_reentrant=True``: the graph node of the checkpoint is in the frames above, in both passes;
* ``use_reentrant=False``: each forward pass under the checkpoint's hooks leaves a node in the graph, and the engine knows
  whether it executes that node now.

Several passes with different neurons in one backward pass cannot be told apart in the second case, which is an error. A
task that is set inside the backward pass comes first: ``nspec.checkpoint_contexts`` does that.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from .active import ActiveSet
from .batch import TaskBatch

Use = tuple[ActiveSet | None, TaskBatch | None]
"""What a forward pass uses: the neurons (None: all) and, for a batch of several tasks, the task of each sentence."""

_FORWARD, _BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__


class ForwardPasses:
    """The forward passes of one layer that may be computed again, and what each used. A copy begins with none."""

    def __init__(self) -> None:
        self._marked: list[tuple[weakref.ref[Any], Use]] = []
        self._unmarked: list[Use] = []  # of passes that no gradient reaches, since the last one was computed again
        self._recomputed = False
        self._reentrant: weakref.WeakKeyDictionary[Any, Use] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return ForwardPasses, ()

    def recomputed(self, layer: str = "a specialised layer") -> Use:
        """What the forward pass of a layer, which errors name, used that is computed again now.

        Raises:
            RuntimeError: there are several of different neurons, or none is known.
        """
        for node in _checkpoints(_BACKWARD):
            if node in self._reentrant:
                return self._reentrant[node]
        alive = [(alive, use) for node, use in self._marked if (alive := node()) is not None]
        # A backward pass towards some inputs only leaves out nodes of a pass that it computes again.
        found = [use for node, use in alive if torch._C._will_engine_execute_node(node)] or [use for _, use in alive]
        if not found:
            found, self._recomputed = self._unmarked, True
        if not found:
            raise RuntimeError(
                f"{layer} runs inside a backward pass, and which of its forward passes that computes again is not known (a "
                "reversible model does so, or a function of its own that computes a forward pass again): set the task "
                "there, with nspec.task inside that function; or switch it off and use torch.utils.checkpoint with "
                "context_fn=nspec.checkpoint_contexts(model)"
            )
        if not all(_same(use, found[0]) for use in found):
            raise RuntimeError(
                f"{layer} is computed again (activation checkpointing), and this backward pass holds forward passes of "
                "several tasks: run a backward pass for each task, or give torch.utils.checkpoint "
                "context_fn=nspec.checkpoint_contexts(model)"
            )
        return found[0]

    def note(self, use: Use, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Remembers a forward pass that may be computed again; the layer goes on with the tensors returned."""
        if not torch.is_grad_enabled():
            if not torch.is_inference_mode_enabled():
                for node in _checkpoints(_FORWARD):
                    self._reentrant[node] = use
            return tensors
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            return tensors  # what a checkpoint without reentrance computes again runs under its hooks
        self._marked = [(node, known) for node, known in self._marked if node() is not None]
        for place, tensor in enumerate(tensors):
            if tensor is not None and tensor.requires_grad:
                marked = _Mark.apply(tensor)
                self._marked.append((weakref.ref(marked.grad_fn), use))
                return (*tensors[:place], marked, *tensors[place + 1 :])
        if self._recomputed:
            self._unmarked, self._recomputed = [], False
        if not any(_same(use, known) for known in self._unmarked):
            self._unmarked.append(use)
        return tensors


class _Mark(torch.autograd.Function):
    """The identity; its node lives as long as the graph of the forward pass."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def _same(a: Use, b: Use) -> bool:
    return a[1] == b[1] and (a[0] is b[0] or a[1] is not None)


def _checkpoints(code: Any) -> list[Any]:
    """The nodes of the reentrant checkpoints whose forward or backward function is running, the innermost first."""
    nodes, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            nodes.append(frame.f_locals["ctx"])
        frame = frame.f_back  # type: ignore[assignment]
    return nodes


def backward_pass() -> int:
    """The number of the backward pass that this code runs in; -1 outside of one, and while a graph is compiled."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
