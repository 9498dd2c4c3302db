"""How much memory a training takes."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch


class PeakMemory:
    """The most memory since it was made: what PyTorch allocates on a GPU, else what the process has in RAM.

    Args:
        device: that is computed on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        self.known = False
        with contextlib.suppress(OSError):  # Linux alone, and not in every container
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.known = True

    def bytes(self) -> int | None:
        """The peak; None where this computer does not say."""
        if not self.known:
            return None
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(found[1]) if found else None
