"""What CUDA graphs read. A graph holds addresses and no references: what it was captured with has to be kept for it."""

from __future__ import annotations

from typing import Any

import torch

_kept: dict[int, Any] = {}


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream, by code that runs on ``device``."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def keep(device: torch.device, *used: Any) -> None:
    """Keeps what was made before a capture and is read in it, for good: nobody tells when a graph is gone.

    Without that, what a task switch drops (the order of a batch's tokens, packed weights) would be memory of something
    else at the next replay.
    """
    if capturing(device):
        _kept.update((id(thing), thing) for thing in used)
