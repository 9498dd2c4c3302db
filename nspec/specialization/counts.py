"""Activation counts: for each task and layer, how many real tokens fired each neuron."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .storage import Kind, Stacked, reading, save_stacked
from .tensors import TaskTensors, check_same_layers, each

_KIND = Kind("counts", ("I32", "I64"))


class ActivationCounts(TaskTensors):
    """``counts[task][layer]`` is an int64 tensor ``[d_ff]``: the number of tokens with an activation above 0.

    A mapping of tasks. ``counts + counts`` adds them up (batches of one task that were counted apart) and joins tasks.

    Args:
        counts: task -> {qualified name of fc1: integer tensor ``[d_ff]``, none negative}. Copied.

    Raises:
        ValueError: no task, tasks with different layers or widths, a layer without neurons, a name that is empty,
            negative counts.
        TypeError: a value that is not an integer tensor, or a name that is no text, or no mapping of mappings.
    """

    def __init__(self, counts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(each(counts, _checked))

    def __repr__(self) -> str:
        return f"ActivationCounts({len(self.tasks)} tasks, {len(self.layers)} layers)"

    def __add__(self, other: ActivationCounts) -> ActivationCounts:
        if not isinstance(other, ActivationCounts):
            return NotImplemented
        joined = {task: dict(layers) for task, layers in self._by_task.items()}
        for task, layers in other._by_task.items():
            mine = joined.get(task)
            if mine is None:
                joined[task] = dict(layers)
            else:
                check_same_layers({f"{task} (left)": mine, f"{task} (right)": layers})
                joined[task] = {layer: _sum(task, layer, mine[layer], count) for layer, count in layers.items()}
        return ActivationCounts(joined)

    def all_reduce(self) -> ActivationCounts:
        """The sum over the processes of ``torch.distributed``; itself where there is one process.

        Every process must hold the same tasks and layers, in the same order.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        flat = torch.cat([count for layers in self._by_task.values() for count in layers.values()])
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        moved = flat.to(device)
        torch.distributed.all_reduce(moved)
        parts = iter(moved.cpu().split([len(c) for layers in self._by_task.values() for c in layers.values()]))
        return ActivationCounts({t: {layer: next(parts) for layer in layers} for t, layers in self._by_task.items()})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``counts.safetensors`` (one integer tensor ``[tasks, d_ff]`` per layer) and a readable ``counts.json``.

        Raises:
            OSError: the files cannot be written; what was there is unchanged.
        """
        stacked = {layer: torch.stack([self._by_task[task][layer] for task in self.tasks]) for layer in self.layers}
        narrow = {
            layer: count.to(torch.int32) if int(count.max() if count.numel() else 0) < 2**31 else count
            for layer, count in stacked.items()
        }
        widths = {layer: count.shape[1] for layer, count in stacked.items()}
        readable = {
            "tasks": self.tasks,
            "layers": {layer: {"d_ff": width} for layer, width in widths.items()},
            "activations": {t: {layer: total(self._by_task[t][layer]) for layer in self.layers} for t in self.tasks},
        }
        save_stacked(Path(folder), _KIND, Stacked(narrow, self.tasks, widths), readable)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ActivationCounts:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no ``counts.safetensors`` in the folder.
            ValueError: the file is broken, is not one of counts, or holds something else than it says; the message names
                the file, what was found and what was expected.
        """
        with reading(Path(folder), _KIND) as (stacked, tasks, _):
            return cls({t: {layer: rows[i] for layer, rows in stacked.items()} for i, t in enumerate(tasks)})


def total(count: Tensor) -> int:
    """The sum of one layer's counts, int64 ``[d_ff]``, exactly: it may be larger than an int64."""
    return (int((count >> 32).sum()) << 32) + int((count & 0xFFFFFFFF).sum())


def _sum(task: str, layer: str, one: Tensor, other: Tensor) -> Tensor:
    both = one + other
    if int(both.min()) < 0:  # of two that are not negative, every sum beyond an int64 is
        raise ValueError(f"the counts of {task}, {layer} add up to more than {2**63 - 1}")
    return both


def _checked(task: str, layer: str, count: Tensor) -> Tensor:
    if not isinstance(count, Tensor) or count.dtype not in (torch.int64, torch.int32):
        found = count.dtype if isinstance(count, Tensor) else type(count).__name__
        raise TypeError(f"counts of {task}, {layer}: found {found}, expected an int64 tensor [d_ff]")
    if count.dim() != 1:
        raise ValueError(f"counts of {task}, {layer} have shape {list(count.shape)}, expected [d_ff]")
    if count.numel() and int(count.min()) < 0:
        raise ValueError(f"counts of {task}, {layer} go down to {int(count.min())}, expected none below 0")
    return count.detach().to("cpu", torch.int64, copy=True)
