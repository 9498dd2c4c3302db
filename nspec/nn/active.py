"""Active neurons of one layer, in the forms that the operators read, kept on the device of the weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nspec.kernels.common.active import active_index, places_of


def let_sizes_vary(*tensors: tuple[Tensor, Sequence[int]]) -> None:
    """Tells torch.compile, where it is in use, that these dimensions differ from task to task.

    It would find out by itself, but with a graph for each layer whose width is the first to differ, and after eight
    graphs it gives up.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return
    for tensor, dims in tensors:
        if not hasattr(tensor, "_dynamo_weak_dynamic_indices"):
            torch._dynamo.maybe_mark_dynamic(tensor, list(dims))


class ActiveSet:
    """The active neurons of one task, or of several tasks one below the other.

    Built once per task and layer; copied to a device on first use there, so that a step costs no copy and no sync. It
    does not change: the replicas of ``nn.DataParallel`` share it, each in a thread and on a device of its own.

    Attributes:
        active: bool ``[d_ff]``; ``[tasks, d_ff]`` for several tasks.
        index: int64 ``[tasks, width]``, as ``kernels/common/active.py`` describes it; ``[1, width]`` for one task.
        places: int32 ``[tasks, d_ff]``, where each neuron is in ``index``; -1 for nowhere.
        rows: int64 ``[n]``, the neurons that are active for one task at least.
        union: bool ``[d_ff]``, the same as a mask.
    """

    def __init__(self, active: Tensor) -> None:
        if active.dtype != torch.bool or active.dim() != 1:
            raise TypeError(f"a mask must be bool [neurons], found {active.dtype} {list(active.shape)}")
        with torch.inference_mode(
            False
        ):  # validation may be the first to need it, and training saves it for its backward
            self.active = active.detach().clone()
            self.union = self.active
            self.rows = self.active.nonzero().squeeze(1)
            self.index = active_index(self.active)
            self.places = places_of(self.index, len(self.active))
        self._copies: dict[torch.device, ActiveSet] = {}

    @classmethod
    def stack(cls, sets: Sequence[ActiveSet]) -> ActiveSet:
        """The sets of several tasks of one layer as one, for tokens sorted by task. Costs no sync on a device."""
        stacked = cls.__new__(cls)
        with torch.inference_mode(False):
            stacked.active = torch.stack([one.active for one in sets])
            stacked.union = stacked.active.any(0)
            stacked.rows = torch.empty(0, dtype=torch.int64, device=stacked.active.device)  # read for one task only
            width = max(one.index.shape[1] for one in sets)
            stacked.index = torch.stack([one._index_row(width) for one in sets])
            stacked.places = places_of(stacked.index, stacked.active.shape[1])
        stacked._copies = {}
        return stacked

    def _index_row(self, width: int) -> Tensor:
        """The index of one task, int64 ``[width]``, in the layout that this width has."""
        if width == self.index.shape[1]:
            return self.index[0]
        if width == len(self.active):
            return torch.where(self.active, torch.arange(width, device=self.active.device), -1)
        return torch.nn.functional.pad(self.index[0], (0, width - self.index.shape[1]), value=-1)

    def let_sizes_vary(self) -> None:
        """Has torch.compile make one graph for sets of all sizes."""
        let_sizes_vary((self.index, (0, 1) if self.active.dim() > 1 else (1,)), (self.rows, (0,)))
        if self.active.dim() > 1:
            let_sizes_vary((self.active, (0,)), (self.places, (0,)))
        for copy in list(self._copies.values()):
            copy.let_sizes_vary()

    def is_on(self, device: torch.device) -> bool:
        """Whether :meth:`on` has nothing to copy."""
        return self.active.device == device or device in self._copies

    def on(self, device: torch.device) -> ActiveSet:
        """This set if it is on ``device``, else its copy there, made once."""
        if self.active.device == device:
            return self
        if device not in self._copies:
            copy = ActiveSet.__new__(ActiveSet)
            with torch.inference_mode(False):
                copy.active, copy.rows, copy.index, copy.places, copy.union = (
                    t.to(device) for t in (self.active, self.rows, self.index, self.places, self.union)
                )
            copy._copies = {}
            copy.let_sizes_vary()
            self._copies.setdefault(device, copy)  # of two threads that made one, the first wins
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": {}}
