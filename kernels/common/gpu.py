"""Whether Triton kernels can be used for a call. Imports neither Triton nor initialises a device."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

OLDEST_TRITON = (3, 6)
OLDEST_CUDA = (8, 0)  # compute capability; bfloat16 products and asynchronous copies begin there


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU in this process (``TRITON_INTERPRET=1``): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _triton() -> str | None:
    """Why Triton cannot be imported; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None  # a build without metadata, as in some images: taken to be new enough
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """The compute capability of a device. Asked for at every call of an operator, and PyTorch takes microseconds."""
    return torch.cuda.get_device_capability(index)


def tensors_in(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments, those in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_in(arg)


def why_not(*args: Any) -> str | None:
    """Why an operator with these arguments has no use for Triton; None where it has. The first tensor decides."""
    first = next(tensors_in(args), None)
    if first is None:
        return "there is no tensor"
    if first.device.type == "cpu":
        if not interpreted():
            return "the tensors are on the CPU"
        if "triton" not in os.environ.get("NSPEC_BACKEND", ""):
            return "Triton's interpreter is slow: it runs when NSPEC_BACKEND asks for triton"
        return _triton()
    if first.device.type != "cuda":
        return f"the tensors are on {first.device.type}, the kernels are for CUDA and ROCm"
    reason = _triton()
    if reason is None and torch.version.hip is None and _capability(first.device.index) < OLDEST_CUDA:
        name = torch.cuda.get_device_name(first.device)
        return f"{name} has compute capability {_capability(first.device.index)}, below {OLDEST_CUDA}"
    return reason
