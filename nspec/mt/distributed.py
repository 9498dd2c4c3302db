"""What the processes of a ``torchrun`` tell each other in training, profiling and validation, and their devices.

Each function also works in a single process, where there is nothing to tell.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist


def resolve_device(device: str = "auto") -> torch.device:
    """The device of this process: with several GPUs under ``torchrun``, the one of its local rank.

    Raises:
        ValueError: an unknown name, or a GPU that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; expected auto, cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if local >= count:
        raise ValueError(f"device is {device} for process {local} of this machine, but PyTorch sees {count} GPUs")
    return torch.device("cuda", local)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits until every process is here."""
    if world() > 1:
        dist.barrier()


def all_sum(values: list[float]) -> list[float]:
    """Sums each value over the processes in the order of ranks, so that every process gets the same bits."""
    return [math.fsum(column) for column in zip(*gather(values))] if world() > 1 else values


def gather(value: Any) -> list[Any]:
    """The picklable value of every process, in the order of ranks, on every process."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values
