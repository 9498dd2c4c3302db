"""The machine, and what a row has to say about it; which device is measured; what its memory and matrix units can do."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def pick_device(name: str = "auto") -> torch.device:
    """The device to measure: ``auto`` takes the first GPU, else the CPU.

    Raises:
        ValueError: a GPU is asked for by name and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no GPU here")
    return torch.device(name)


def cpu_name() -> str:
    """The model name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def commit(folder: Path | None = None) -> str:
    """The commit of a checkout, with ``-dirty`` after it where files differ from it.

    Without a repository (a copy of the files alone) it is what ``NSPEC_COMMIT`` says, else empty.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder or ROOT, capture_output=True, text=True)
    except OSError:
        return os.environ.get("NSPEC_COMMIT", "")
    return done.stdout.strip() or os.environ.get("NSPEC_COMMIT", "")


def device_name(device: torch.device) -> str:
    """What is measured, in words: the GPU's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


@functools.cache
def stamp(device: torch.device) -> dict[str, Any]:
    """What every row carries: device, versions, commit, date (UTC) and the backends that were asked for."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    driver = ""
    if device.type == "cuda":
        driver = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "backend_asked": os.environ.get("NSPEC_BACKEND", "auto"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
