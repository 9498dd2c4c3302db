"""The processes of one run: a single one, or those that ``torchrun`` or ``accelerate launch`` started.

:class:`World` knows them from the environment before they are connected, and with one process needs no torch; the
functions ask PyTorch, and in a single process there is nothing to tell.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class World:
    """Rank and size from the environment, and what the processes tell each other.

    With one process nothing of this needs torch.

    Attributes:
        rank: of this process; rank 0 leads: it alone writes, locks and speaks.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0

    def connect(self, device: str) -> None:
        """Joins the other processes, with gloo for the CPU and NCCL for GPUs.

        Args:
            device: ``cpu``, ``cuda`` or ``auto``.
        """
        if self.size == 1:
            return
        import torch

        if torch.distributed.is_initialized():
            return
        gpu = device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # The others wait while rank 0 prepares the corpus, which may take far longer than the default half hour.
        torch.distributed.init_process_group(
            "cuda:nccl,cpu:gloo" if gpu else "gloo", timeout=datetime.timedelta(days=2)
        )

    def lead(self, work: Callable[[], T]) -> T:
        """Calls ``work`` on rank 0 and returns its result, or raises its error, on every rank.

        The result must be picklable.
        """
        if self.size == 1:
            return work()
        import torch

        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = work()
            except Exception as error:
                torch.distributed.broadcast_object_list([None, _portable(error)])
                raise
        torch.distributed.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def wait(self) -> None:
        """Returns once every process has come here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def close(self) -> None:
        """Leaves the other processes."""
        if self.size > 1:
            import torch

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _portable(error: Exception) -> Exception:
    """An error that can be pickled: itself where that works, else of a plain type with the same text."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        base = next(kind for kind in (OSError, ValueError, TypeError, Exception) if isinstance(error, kind))
        return base(str(error))
    return error


def resolve_device(device: str = "auto") -> torch.device:
    """The device of this process: with several GPUs under ``torchrun``, the one of its local rank.

    Raises:
        ValueError: an unknown name, or a GPU that is not there.
    """
    import torch

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
    from torch import distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    from torch import distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits until every process is here."""
    from torch import distributed as dist

    if world() > 1:
        dist.barrier()


def all_sum(values: list[float]) -> list[float]:
    """Sums each value over the processes in the order of ranks, so that every process gets the same bits."""
    return [math.fsum(column) for column in zip(*gather(values))] if world() > 1 else values


def gather(value: Any) -> list[Any]:
    """The picklable value of every process, in the order of ranks, on every process."""
    from torch import distributed as dist

    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values
