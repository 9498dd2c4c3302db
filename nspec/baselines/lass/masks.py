"""Weight masks: for each task and weight matrix, the single weights that the task uses. Packed, one bit for a weight.

``weight_masks.safetensors`` holds one tensor per layer, named by the qualified name of the linear module, with a row per
task: uint8 ``[tasks, ceil(out * in / 8)]``, where bit j % 8 of byte j // 8 is weight j in row-major order and the bits
after the last weight are 0. Its metadata has one entry, ``nspec``, a JSON object with ``format`` (1), ``kind``,
``tasks``, ``shapes`` by layer and ``sha256``. Only this file is read; ``weight_masks.json`` is for people and for other
tools. See :mod:`nspec.specialization.storage`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nspec.specialization.storage import Kind, Stacked, reading, save_stacked
from nspec.specialization.tensors import ByTask, check_same_layers, each

_KIND = Kind("weight_masks", ("U8",), entry="shapes", bits=True)
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.int64)


class PackedMask:
    """The mask of one matrix for one task, as bits. It does not change, so copies of a model share it.

    Attributes:
        packed: uint8 ``[ceil(out * in / 8)]`` on the CPU; bit j % 8 of byte j // 8 is weight j in row-major order.
        shape: ``(out, in)``.
    """

    def __init__(self, packed: Tensor, shape: tuple[int, int]) -> None:
        self.packed, self.shape = packed, shape

    @classmethod
    def pack(cls, mask: Tensor) -> PackedMask:
        """Packs a bool tensor ``[out, in]``."""
        bits = np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1), bitorder="little")
        return cls(torch.from_numpy(bits), (mask.shape[0], mask.shape[1]))

    @property
    def numel(self) -> int:
        """Number of weights, kept or not."""
        return self.shape[0] * self.shape[1]

    def unpack(self, device: torch.device | str = "cpu") -> Tensor:
        """A new bool tensor ``[out, in]`` on ``device``; only the bits are copied there."""
        # Never an inference tensor, even when validation is the first to need it: training saves it for its backward.
        with torch.inference_mode(False), torch.no_grad():
            packed = self.packed.to(device)
            bits = packed[:, None] & (1 << torch.arange(8, device=device)).to(torch.uint8)
            return (bits != 0).view(-1)[: self.numel].view(self.shape)

    def kept(self) -> int:
        """Number of weights that are kept."""
        return int(np.bincount(self.packed.numpy(), minlength=256) @ _BITS_SET)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedMask:
        return self


class _Layers(Mapping[str, Tensor]):
    """The masks of one task, each unpacked when it is asked for."""

    def __init__(self, packed: dict[str, PackedMask]) -> None:
        self._packed = packed

    def __getitem__(self, layer: str) -> Tensor:
        return self._packed[layer].unpack()

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class WeightMasks(ByTask[PackedMask]):
    """``masks[task][layer]`` is a bool tensor ``[out, in]``, True for the weights that are kept. A mapping of tasks.

    In memory there are bits only: 60 tasks of 100 million weights take 750 MB. A tensor is unpacked whenever it is asked
    for, and changing it changes no mask.

    Args:
        masks: task -> {qualified name of a linear module: bool tensor ``[out, in]``}. Packed one by one, so a mapping
            that makes its values on demand needs memory for one of them.

    Raises:
        ValueError: no task, tasks with different layers or shapes, or a name that is empty.
        TypeError: a value that is not a bool tensor ``[out, in]``, or a name that is no text, or no mapping of mappings.

    Example:
        >>> masks = WeightMasks({"en-de": {"fc1": torch.tensor([[True, False], [True, True]])}})
        >>> masks, masks["en-de"]["fc1"][0].tolist()
        (WeightMasks(1 tasks, 1 layers, density 0.750), [True, False])
    """

    def __init__(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._set(each(masks, _checked))

    def _set(self, by_task: dict[str, dict[str, PackedMask]]) -> None:
        check_same_layers(by_task, lambda mask: f"weights {list(mask.shape)}")
        first = next(iter(by_task.values()))
        self._by_task = {task: {layer: layers[layer] for layer in first} for task, layers in by_task.items()}

    @classmethod
    def _of_packed(cls, by_task: dict[str, dict[str, PackedMask]]) -> WeightMasks:
        masks = cls.__new__(cls)
        masks._set(by_task)
        return masks

    @classmethod
    def union_of_tasks(cls, parts: Iterable[WeightMasks]) -> WeightMasks:
        """The masks of all tasks of several; nothing is copied.

        Raises:
            ValueError: nothing given, a task that two parts have, or parts with different layers or shapes.
        """
        by_task: dict[str, dict[str, PackedMask]] = {}
        for part in parts:
            for task, layers in part._by_task.items():
                if task in by_task:
                    raise ValueError(f"task {task} is given twice, expected masks of different tasks")
                by_task[task] = layers
        return cls._of_packed(by_task)

    def __getitem__(self, task: str) -> Mapping[str, Tensor]:
        return _Layers(self._by_task[task])

    def __repr__(self) -> str:
        kept = sum(mask.kept() for layers in self._by_task.values() for mask in layers.values())
        share = kept / max(1, sum(mask.numel for layers in self._by_task.values() for mask in layers.values()))
        return f"WeightMasks({len(self.tasks)} tasks, {len(self.layers)} layers, density {share:.3f})"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of each layer."""
        return {layer: mask.shape for layer, mask in next(iter(self._by_task.values())).items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed bits of all tasks, in memory and on disk."""
        return sum(mask.packed.numel() for layers in self._by_task.values() for mask in layers.values())

    def packed(self, task: str, layer: str) -> PackedMask:
        """The mask of one task and layer, as bits."""
        return self._by_task[task][layer]

    def density(self) -> dict[str, dict[str, float]]:
        """For each task and layer, the share of weights that are kept."""
        return {
            task: {layer: mask.kept() / max(1, mask.numel) for layer, mask in layers.items()}
            for task, layers in self._by_task.items()
        }

    def digest(self) -> str:
        """SHA-256, in hexadecimal, over tasks, layers, shapes and bits. Equal masks have equal ones in any order."""
        shapes = sorted(self.shapes.items())
        found = hashlib.sha256(json.dumps([sorted(self.tasks), shapes]).encode())
        for task in sorted(self.tasks):
            for layer, _ in shapes:
                found.update(self._by_task[task][layer].packed.numpy().data)
        return found.hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``weight_masks.safetensors`` and a readable ``weight_masks.json``, each whole or not at all.

        Raises:
            OSError: the files cannot be written; what was there is unchanged.
        """
        rows = {layer: torch.stack([self._by_task[task][layer].packed for task in self.tasks]) for layer in self.shapes}
        density = {task: [round(share, 4) for share in layers.values()] for task, layers in self.density().items()}
        readable = {"tasks": self.tasks, "layers": self.shapes, "density": density}
        save_stacked(Path(folder), _KIND, Stacked(rows, self.tasks, self.shapes), readable)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> WeightMasks:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no ``weight_masks.safetensors`` in the folder.
            ValueError: the file is broken, of another kind, of a newer format, or holds something else than it says; the
                message names the file, what was found and what was expected.
        """
        with reading(Path(folder), _KIND) as (stacked, tasks, shapes, _):
            # Copies, so that no task keeps the others' bits alive.
            return cls._of_packed(
                {
                    task: {layer: PackedMask(rows[i].clone(), tuple(shapes[layer])) for layer, rows in stacked.items()}
                    for i, task in enumerate(tasks)
                }
            )


def _checked(task: str, layer: str, mask: Tensor) -> PackedMask:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"weight mask of {task}, {layer}: found {found}, expected a bool tensor [out, in]")
    return PackedMask.pack(mask)
