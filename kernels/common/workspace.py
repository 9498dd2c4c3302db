"""Scratch memory of the CPU backends that is kept between calls.

A fresh block of many megabytes costs a page fault for every 4 KB of it, which for the matrices here takes as long as
filling them. Each thread keeps one block per name, as large as the largest call needed.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor of that shape with anything in it, valid until this thread asks for ``name`` again."""
    blocks: dict[str, Tensor] = _kept.__dict__
    size = math.prod(shape) * dtype.itemsize
    block = blocks.get(name)
    if block is None or block.numel() < size:
        block = blocks[name] = torch.empty(size, dtype=torch.uint8)
    return block[:size].view(dtype).view(shape)
