"""The native library (``kernels/csrc``): found, loaded on first use, and where it cannot be used, the reason.

It lies beside this file once setup.py has built it. Nothing is loaded at import.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import torch

from .checks import PLAIN

#: Where setup.py and CMakeLists.txt put it. The same name on Linux and macOS: it is loaded, never linked against.
LIBRARY = Path(__file__).resolve().parent / "libnspec_cpu.so"


def setting() -> str:
    """``NSPEC_NATIVE``: ``"0"`` (not used), ``"1"`` (used where it can be: the default) or ``"require"``.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get("NSPEC_NATIVE", "1")
    if value not in ("0", "1", "require"):
        raise ValueError(f"NSPEC_NATIVE must be 0, 1 or require, found {value!r}")
    return value


def build_version(library: str | os.PathLike[str] = LIBRARY) -> str | None:
    """The PyTorch version whose headers a library was built with, or None where the file is no library of ours."""
    try:
        found = re.search(rb"nspec-native-build: torch ([^;\0]+);", Path(library).read_bytes())
    except OSError:
        return None
    return found.group(1).decode() if found else None


@functools.cache
def _load(library: Path) -> str | None:
    """Loads the library once a process; the reason where that fails."""
    if not library.is_file():
        return (
            f"the native library is not there ({library}); build it with `NSPEC_BUILD_NATIVE=1 pip install "
            "--no-build-isolation .`, which needs torch, CMake and a C++ compiler"
        )
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        built = build_version(library)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if built is None:
            return f"{library} is not a native library of nspec: {first_line}"
        return f"{library} was built with torch {built}, this is torch {torch.__version__}: {first_line}"
    return None


def why_not(*_: Any) -> str | None:
    """Why the native library is not used, in one line; None where it is. The first call loads it.

    It takes, and does not look at, the arguments of an operator: the answer is the same for every call.

    Raises:
        RuntimeError: ``NSPEC_NATIVE=require`` and the library cannot be loaded; the message is the reason.
        ValueError: ``NSPEC_NATIVE`` is none of 0, 1 and require.
    """
    wanted = setting()
    if wanted == "0":
        return "NSPEC_NATIVE=0"
    reason = _load(LIBRARY)
    if reason is not None and wanted == "require":
        raise RuntimeError(f"NSPEC_NATIVE=require: {reason}")
    return reason


def available() -> bool:
    """Whether native operators can be called in this process. The first call loads the library."""
    return why_not() is None


def require() -> None:
    """Loads the library.

    Raises:
        RuntimeError: it cannot be used; the message is :func:`why_not`'s.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the native library is not used: {reason}")


_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses_tensors(*tensors: torch.Tensor | None) -> str | None:
    """Why the native operators do not take these tensors: they take plain CPU ones of float32, bfloat16, float16."""
    for t in tensors:
        if t is not None and not (type(t) in PLAIN and t.is_cpu and t.dtype in _TYPES):
            return f"a tensor is a {type(t).__name__} of {t.dtype} on {t.device}"
    return None


def with_contiguous_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy where the elements of a row do not follow one another or rows overlap."""
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
