"""Neuron masks: for each task and layer, the neurons that the task uses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .storage import Kind, Stacked, reading, save_stacked
from .tensors import TaskTensors, each

_KIND = Kind("masks", ("U8",), bits=True)


class NeuronMasks(TaskTensors):
    """``masks[task][layer]`` is a bool tensor ``[d_ff]``, True for the neurons that are active. A mapping of tasks.

    Args:
        masks: task -> {qualified name of fc1: bool tensor ``[d_ff]``}. Copied.

    Raises:
        ValueError: no task, tasks with different layers or widths, a layer without neurons, or a name that is empty.
        TypeError: a value that is not a bool tensor ``[d_ff]``, or a name that is no text, or no mapping of mappings.

    Example:
        >>> import tempfile
        >>> masks = NeuronMasks({"en-de": {"fc1": torch.tensor([True, False, True, True])}})
        >>> masks.tasks, masks.layers, masks.density()["en-de"]["fc1"]
        (['en-de'], ['fc1'], 0.75)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     masks.save(folder)
        ...     NeuronMasks.load(folder)
        NeuronMasks(1 tasks, 1 layers, mean density 0.750)
    """

    def __init__(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(each(masks, _checked))

    def __repr__(self) -> str:
        mean = sum(sum(layers.values()) for layers in self.density().values()) / (len(self.tasks) * len(self.layers))
        return f"NeuronMasks({len(self.tasks)} tasks, {len(self.layers)} layers, mean density {mean:.3f})"

    def density(self) -> dict[str, dict[str, float]]:
        """For each task and layer, the share of neurons that are active."""
        return {
            task: {layer: float(mask.sum()) / max(1, len(mask)) for layer, mask in layers.items()}
            for task, layers in self._by_task.items()
        }

    def summary(self) -> str:
        """A table for people: for each task how many neurons it keeps, of which layers none, and of which most.

        Example:
            >>> masks = NeuronMasks({"cy": {"fc1": torch.arange(100) < 3}, "mt": {"fc1": torch.arange(100) < 5}})
            >>> print(masks.summary())
            task      neurons  share  layers without  most in a layer
            cy              3  3.00%               0             3.0%
            mt              5  5.00%               0             5.0%
            any task        5  5.00%               0             5.0%
        """
        total = sum(len(mask) for mask in self._by_task[self.tasks[0]].values())
        union = {layer: torch.stack([self._by_task[t][layer] for t in self.tasks]).any(0) for layer in self.layers}
        rows = [("task", "neurons", "share", "layers without", "most in a layer")]
        for task, layers in [*self._by_task.items(), ("any task", union)]:
            kept = sum(int(mask.sum()) for mask in layers.values())
            without = sum(not bool(mask.any()) for mask in layers.values())
            most = max(float(mask.double().mean()) for mask in layers.values())
            rows.append((task, f"{kept}", f"{kept / total:.2%}", f"{without}", f"{most:.1%}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``masks.safetensors`` (packed bits, one tensor per layer) and a readable ``masks.json``.

        Raises:
            OSError: the files cannot be written; what was there is unchanged.
        """
        stacked = {}
        for layer in self.layers:
            bits = torch.stack([self._by_task[task][layer] for task in self.tasks]).numpy()
            stacked[layer] = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))
        widths = {layer: len(mask) for layer, mask in self._by_task[self.tasks[0]].items()}
        readable = {
            "tasks": self.tasks,
            "layers": {layer: {"d_ff": width} for layer, width in widths.items()},
            "density": {
                task: [round(value, 4) for value in layers.values()] for task, layers in self.density().items()
            },
        }
        save_stacked(Path(folder), _KIND, Stacked(stacked, self.tasks, widths), readable)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> NeuronMasks:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no ``masks.safetensors`` in the folder.
            ValueError: the file is broken, is not one of masks, or holds something else than it says; the message names
                the file, what was found and what was expected.
        """
        with reading(Path(folder), _KIND) as (packed, tasks, widths, _):
            bits = {
                layer: torch.from_numpy(np.unpackbits(rows.numpy(), axis=1, count=widths[layer], bitorder="little"))
                for layer, rows in packed.items()
            }
            return cls({task: {layer: rows[i].bool() for layer, rows in bits.items()} for i, task in enumerate(tasks)})


def _checked(task: str, layer: str, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 1:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        way = " (torch.from_numpy makes one of an array)" if isinstance(mask, np.ndarray) else ""
        raise TypeError(f"mask of {task}, {layer}: found {found}, expected a bool tensor [d_ff]{way}")
    return mask.detach().to("cpu", copy=True)
