"""The backends that the operators are tested on: all that this machine has."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch

from nspec.kernels.common import gpu, native


@dataclass(frozen=True)
class Place:
    """Where a test computes: a backend, forced by ``NSPEC_BACKEND``, its device, and what it can take there."""

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    interpreted: bool

    def skip_unless(self, dtype: torch.dtype) -> None:
        """Skips the test where the backend does not compute in ``dtype``."""
        if dtype not in self.dtypes:
            pytest.skip(f"{self.backend} does not take {dtype} here")


@pytest.fixture(params=["reference", "native", "triton"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Each backend of ``OPERATOR`` of the test's module in turn; those that cannot run are skipped with the reason."""
    name = request.param
    operator = request.module.OPERATOR
    backends = {b.name: b for b in importlib.import_module(f"nspec.kernels.{operator}.op").BACKENDS}
    if name not in backends:
        pytest.skip(f"{operator} has no backend {name}")
    monkeypatch.setenv("NSPEC_BACKEND", f"{operator}={name}")
    if name == "native":
        if (reason := native.why_not()) is not None:
            pytest.skip(reason)
        return Place(name, "cpu", (torch.float32, torch.bfloat16, torch.float16), False)
    if name == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if (reason := gpu.why_not(torch.empty(0, device=device))) is not None:
            pytest.skip(reason)
        # The interpreter multiplies the bit patterns of bfloat16, so there it is tested on a GPU alone.
        low = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,)
        return Place(name, device, (torch.float32, *low), device == "cpu")
    return Place(name, "cpu", (torch.float64, torch.float32, torch.bfloat16, torch.float16), False)
