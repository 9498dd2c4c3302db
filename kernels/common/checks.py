"""Argument checks with one wording. Every message says what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A subclass (DTensor, FakeTensor, ...) has its own idea of where its data is: kernels that read memory take these alone.
PLAIN = (Tensor, torch.nn.Parameter)


def shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """Raises ValueError unless ``tensor`` has the expected shape; None in ``expected`` stands for any size."""
    found = tensor.shape
    fits = len(found) == len(expected)
    for have, want in zip(found, expected):
        fits = fits and (want is None or have == want)
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} has shape {list(found)}, expected [{wanted}]")


def boolean(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is bool."""
    if tensor.dtype is not torch.bool:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.bool")


def numbers(name: str, index: Tensor, below: int) -> None:
    """Checks an index ``[k]`` of rows or columns: int64; on the CPU that each is one of ``below``.

    A look at those on a GPU would wait for it: kernels take none that is not there.
    """
    if index.dtype is not torch.int64 or index.dim() != 1:
        raise TypeError(f"{name} is {index.dtype} {list(index.shape)}, expected torch.int64 [k]")
    if index.device.type == "cpu" and index.numel():
        least, most = (int(end) for end in index.aminmax())
        if least < 0 or most >= below:
            raise ValueError(f"{name} holds {least if least < 0 else most}, expected numbers from 0 to {below - 1}")


def active_sets(active: Tensor, d_ff: int, task_offsets: Tensor | None) -> None:
    """Checks ``active``: bool ``[d_ff]``, or ``[tasks, d_ff]`` together with ``task_offsets`` ``[tasks + 1]``."""
    boolean("active", active)
    if task_offsets is None:
        if active.shape != (d_ff,):
            shape("active", active, [d_ff])
        return
    shape("active", active, [None, d_ff])
    offsets(task_offsets, active.shape[0])


def sets(index: Tensor, places: Tensor | None, active: Tensor) -> None:
    """Checks what a caller keeps of ``active``: index int64 ``[tasks, width]``, places int32 ``[tasks, d_ff]``."""
    tasks, d_ff = (1, active.shape[0]) if active.dim() == 1 else active.shape
    if index.dtype is not torch.int64 or index.dim() != 2 or index.shape[0] != tasks:
        raise ValueError(
            f"index is {index.dtype} {list(index.shape)}, expected torch.int64 [{tasks}, width], as active_index gives it"
        )
    if places is not None and (places.dtype is not torch.int32 or tuple(places.shape) != (tasks, d_ff)):
        raise ValueError(
            f"places is {places.dtype} {list(places.shape)}, expected torch.int32 [{tasks}, {d_ff}], as places_of gives it"
        )


def offsets(task_offsets: Tensor, tasks: int | None = None) -> None:
    """Checks dtype and shape of ``task_offsets``; the values are checked where they are read."""
    if task_offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"task_offsets has dtype {task_offsets.dtype}, expected torch.int32 or torch.int64")
    shape("task_offsets", task_offsets, [None if tasks is None else tasks + 1])
    if task_offsets.shape[0] < 1:
        raise ValueError("task_offsets is empty, expected tasks + 1 numbers that start with 0")


def segments(task_offsets: Tensor | None, tokens: int) -> list[tuple[int, int]]:
    """The token ranges of the tasks: ``[(0, tokens)]`` without offsets.

    Raises:
        ValueError: the offsets do not rise from 0 to the number of tokens.
    """
    if task_offsets is None:
        return [(0, tokens)]
    bounds = task_offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"task_offsets is {bounds}, expected numbers that rise from 0 to the {tokens} tokens")
    return list(zip(bounds, bounds[1:]))
