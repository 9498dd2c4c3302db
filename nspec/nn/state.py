"""What nspec keeps on a module, as its one attribute ``_nspec``: what a layer is switched to, and what was before."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from .batch import TaskBatch
from .recompute import ForwardPasses, Use, backward_pass


class SwitchedTo(NamedTuple):
    """What a layer is switched to.

    Attributes:
        task: the task, or the task of each sentence of a batch; None: none.
        use: what the layer computes with for it: its neurons, its mask, its adapter.
        batch: of several tasks.
        set_in: the backward pass in which it was set; -1 outside of one.
    """

    task: Any = None
    use: Any = None
    batch: TaskBatch | None = None
    set_in: int = -1


class Around:
    """What is kept on a module that is no specialised layer: the holder of one, or one of which an attribute was changed.

    Attributes:
        places: attributes that are specialised layers, each with the layer's qualified name.
        before: what attributes were that were changed: a tuple of the value on the instance, or none.
    """

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.before: dict[str, tuple[Any, ...]] = {}

    @classmethod
    def of(cls, module: nn.Module) -> Around:
        """That of a module, made where there is none."""
        found: Around = module.__dict__.setdefault("_nspec", cls())
        return found


class LayerState:
    """The state of one layer.

    Attributes:
        task: as of :class:`SwitchedTo`; so are ``use``, ``batch`` and ``set_in``.
        passes: the forward passes that may be computed again.
        block: the ``nspec.task`` block that switches the layer now; None: nobody does.
        shared: what the layers of a model have in common.
        first: whether a pass begins with it.
    """

    def __init__(self) -> None:
        self.task, self.use, self.batch, self.set_in = SwitchedTo()
        self.passes = ForwardPasses()
        self.block: Any = None
        self.shared: Any = None
        self.first = True

    def switch(self, to: SwitchedTo) -> None:
        """Sets what the next forward passes use."""
        self.task, self.use, self.batch, self.set_in = to

    def switched_to(self) -> SwitchedTo:
        """What it is switched to."""
        return SwitchedTo(self.task, self.use, self.batch, self.set_in)

    def current(self) -> Use:
        """What a forward pass uses that begins now: in a backward pass what the one used that is computed again."""
        if not torch.compiler.is_compiling():
            running = backward_pass()
            if running >= 0 and running != self.set_in:
                return self.passes.recomputed(getattr(self, "name", "a specialised layer"))
        return self.use, self.batch

    def note(self, use: Use, *tensors: Any) -> tuple[Any, ...]:
        """Remembers a pass in case it is computed again; the layer goes on with the tensors returned."""
        return tensors if torch.compiler.is_compiling() else self.passes.note(use, *tensors)

    def replica(self) -> Any:
        """The state of a replica of the layer, which runs in a thread of its own."""
        return copy.copy(self)
