"""What to do about an exception in one of many things to measure: say it, and tell whether the process can go on."""

from __future__ import annotations

import sys
import traceback

import torch

LOST = "the GPU cannot be used by this process any more after that error; what is left is not measured, run it again"


class DeviceLost(RuntimeError):
    """An error on the GPU after which this process cannot use it."""


def in_a_line(error: BaseException) -> str:
    """``OutOfResources: out of resource: shared memory``: the type and the first line that is not empty."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def report(what: str, error: Exception, device: torch.device) -> str:
    """Writes an ``error:`` line and where it was raised to standard error, at once; returns the error in a line.

    Raises:
        DeviceLost: nothing more can be measured by this process after this error, or one was that.
    """
    if isinstance(error, DeviceLost):  # which has been reported
        raise error
    lines = "".join(traceback.format_exception(error)).splitlines()[-25:]  # an error of a compiler stands at its end
    shown = "\n".join(f"    {line}" for line in lines)
    print(f"error: {what}: {in_a_line(error)}\n{shown}", file=sys.stderr, flush=True)
    if device_is_lost(device):
        raise DeviceLost(f"{what}: {in_a_line(error)}") from error
    return in_a_line(error)


def device_is_lost(device: torch.device) -> bool:
    """Whether an error on the GPU (a bad address, an assertion in a kernel) has ended its use by this process.

    Every further call would raise the same error, so that what is left has to be measured by another process.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False
