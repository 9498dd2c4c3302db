"""What a report of a problem should hold: versions, devices, threads, and the backend that each operator would take.

``nspec env`` and ``python -m nspec.env`` print it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import nspec

PACKAGES = (
    "torch",
    "triton",
    "safetensors",
    "numpy",
    "transformers",
    "accelerate",
    "datasets",
    "sentencepiece",
    "ctranslate2",
    "sacrebleu",
    "Babel",
    "qwanqwa",
    "matplotlib",
    "scipy",
    "tensorboard",
    "typer",
    "rich",
    "PyYAML",
    "Jinja2",
    "peft",
    "lang2vec",
)

Rows = list[tuple[str, str]]


def system() -> Rows:
    """(name, value) of the machine, the interpreter and PyTorch's view of them."""
    import torch

    rows = [
        ("nspec", f"{nspec.__version__} in {Path(nspec.__file__).parent}"),
        ("python", f"{platform.python_version()} in {sys.prefix}"),
        ("system", platform.platform()),
        ("processor", f"{_processor()}, {_cores()} cores for this process"),
        ("threads", f"{torch.get_num_threads()} of PyTorch"),
        ("vector units", torch.backends.cpu.get_cpu_capability()),
        ("CUDA", _cuda()),
    ]
    rows += [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith(("NSPEC_", "OMP_", "TRITON_"))]
    return rows


def packages() -> Rows:
    """(name, version) of the packages that nspec can use, ``not installed`` for those that are not there."""
    rows = []
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def engines() -> list[tuple[str, str, str]]:
    """(what, engine, reason): what translates with ``decode.engine`` auto, by device."""
    import torch

    if importlib.util.find_spec("transformers") is None:
        return [
            (
                "search of translations",
                "none",
                "transformers is not installed (pip install '.[mt]' in nspec's checkout)",
            )
        ]
    from nspec.mt.scoring.config import DecodeConfig
    from nspec.mt.scoring.engine import choose

    places = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    chosen = [(place.type, choose(DecodeConfig(), place)) for place in places]
    return [(f"search of translations, {place}", engine.name, engine.reason) for place, engine in chosen]


def operators() -> list[tuple[str, str, str]]:
    """(operator, backend, reason) for each operator, as an ordinary call would take it now on each kind of device."""
    import torch

    from nspec.kernels.common import backend

    places = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    places += [("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    return [
        (f"{choice.operator}, {device}, {str(dtype).removeprefix('torch.')}", choice.backend, choice.reason)
        for device, dtype in places
        for choice in backend.explain(device, dtype)
    ]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda() -> str:
    import torch

    built = torch.version.cuda or torch.version.hip
    if not built:
        return "not in this PyTorch"
    if not torch.cuda.is_available():
        return f"{built}, no device"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{built}, {', '.join(names)}"


def main() -> int:
    """Prints four tables.

    Returns:
        The exit code, 0.
    """
    print_tables(
        [("machine", system()), ("packages", packages()), ("operators", operators()), ("translation", engines())]
    )
    return 0


def print_tables(tables: Sequence[tuple[str, Sequence[tuple[str, ...]]]]) -> None:
    """Prints titled tables in aligned columns; rich is not needed, as this must work where the extras are missing."""
    for title, rows in tables:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        print(title)
        for row in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + f"  {row[-1]}")
        print()


if __name__ == "__main__":
    sys.exit(main())
