"""A GPU that computes nothing, so that the host's part of the GPU path runs, is counted and is timed on any machine.

Tensors are tiny and on the CPU. What would reach a GPU ends here, in four places:

* Triton's driver: kernels are compiled for compute capability 9.0; a launch is counted and goes nowhere.
* Matrix products of PyTorch (``PRODUCTS``): counted; the result is memory as it was found. So each costs 1 to 3 µs,
  whatever its dtype and whoever calls it, ours and PyTorch's own layers alike. The CPU's own products take 2 to 35 µs at
  these sizes by dtype and library, which says nothing of cuBLAS.
* ``torch.cuda.get_device_capability``, which the choice of block sizes asks.
* The refusal of tensors on the CPU by the backend ``triton``, and ``mm_float32``, which casts its operands there.

PyTorch's other operations run, on tensors so small that it is the call that takes the time. Numbers are garbage. What a
device adds is missing: the driver's calls, ``torch.cuda.device``, CUDA's allocator, copies to the device. Code that asks
for the type of the device goes the CPU's way here (so offsets of tasks are checked in each call, not once a batch); where
it means the interpreter, it should ask ``gpu.interpreted``.

Triton keeps what it compiled for the driver of the process: :func:`install` is for a process that does nothing else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TARGET = "cuda:90"
ON_THE_CPU = "the tensors are on the CPU"
"""The refusal that is overruled."""

PRODUCTS = (
    *("mm", "mm.out", "mm.dtype", "mm.dtype_out", "bmm", "bmm.out"),
    *("addmm", "addmm.out", "baddbmm", "baddbmm.out", "_addmm_activation", "_addmm_activation.out"),
)
"""Operators of ``aten``: on a GPU one call of cuBLAS each."""


@dataclass
class FakeGpu:
    """What reached the GPU since it was last asked (:meth:`take`).

    Attributes:
        launches: names of the Triton kernels, in order.
        products: names of PyTorch's matrix products, in order.
    """

    launches: deque[str] = field(default_factory=lambda: deque(maxlen=10_000))
    products: deque[str] = field(default_factory=lambda: deque(maxlen=10_000))

    def take(self) -> tuple[list[str], list[str]]:
        """Launches and products since the last call."""
        found = list(self.launches), list(self.products)
        self.launches.clear()
        self.products.clear()
        return found


@functools.cache
def install() -> FakeGpu:
    """Puts the GPU in place for the rest of the process, once.

    Raises:
        RuntimeError: Triton is missing or interprets its kernels, or the package has changed so that a call would not take
            the path that it takes on a GPU.
    """
    from nspec.kernels.common import gpu

    if gpu.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set, and kernels would be interpreted: unset it")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed: there is no GPU path to measure (pip install triton)")
    os.environ["NSPEC_BACKEND"] = "triton"  # a call that would go elsewhere is an error
    fake = FakeGpu()
    _triton_driver(fake)
    _library(fake)
    setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))  # noqa: B010
    _admit_cpu_tensors()
    _one_product_in_float32()
    from nspec.kernels.common.triton_launch import target_of

    if (found := target_of(torch.device("cpu"))) != TARGET:
        raise RuntimeError(f"target_of gives {found!r} for a CPU, expected {TARGET!r}: adapt {__name__} to it")
    return fake


def _triton_driver(fake: FakeGpu) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import _allocation
    from triton.runtime.driver import driver

    class Utils:
        """What Triton loads a compiled kernel with: all registers, all shared memory of an H100."""

        def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 100, 0, 1024  # module, function, registers, spills, most threads

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    class Launcher:
        """What Triton calls for a launch. The workspace of tensor descriptors is asked for as by the real one."""

        def __init__(self, _: Any, metadata: Any) -> None:
            self.name = metadata.name
            self.size, self.align = metadata.global_scratch_size, metadata.global_scratch_align
            self.ctas = getattr(metadata, "num_ctas", 1)

        def __call__(self, x: int, y: int, z: int, stream: int, *_: Any) -> None:
            if self.size > 0:
                _allocation._allocator.get()(x * y * z * self.ctas * self.size, self.align, stream)
            fake.launches.append(self.name)

    class Driver:
        utils, launcher_cls = Utils(), Launcher
        target = GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return self.target

    driver.set_active(Driver())


_library_kept: list[torch.library.Library] = []  # what it registered goes with it


def _library(fake: FakeGpu) -> None:
    """Replaces PyTorch's products on the CPU by ones that compute nothing."""

    def counted(name: str) -> Callable[..., Tensor]:
        note, first = fake.products.append, int("add" in name)  # where the factors begin: behind what is added

        def into(*_: Any, out: Tensor, **__: Any) -> Tensor:
            note(name)
            return out

        def fresh(*args: Any, **_: Any) -> Tensor:
            note(name)
            a, b, *dtype = args[first:]
            return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=dtype[0] if dtype else a.dtype)

        return into if name.endswith("out") else fresh

    library = torch.library.Library("aten", "IMPL")
    _library_kept.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name in PRODUCTS:
            library.impl(name, counted(name), "CPU")


def _admit_cpu_tensors() -> None:
    """The backend ``triton`` of each operator still asks what it asks, and takes tensors on the CPU."""
    from nspec.kernels.common.backend import OPERATORS, Backend

    def overrule(backend: Backend) -> None:
        asked = backend.why_not

        def why_not(*args: Any) -> str | None:
            reason = asked(*args)
            return None if reason == ON_THE_CPU else reason

        object.__setattr__(backend, "why_not", why_not)  # frozen, and whoever holds it has to see it

    for operator in OPERATORS:
        backends = importlib.import_module(f"nspec.kernels.{operator}.op").BACKENDS
        found = [backend for backend in backends if backend.name == "triton"]
        if len(found) != 1:
            raise RuntimeError(f"{operator} has {len(found)} backends 'triton', expected one: adapt {__name__} to it")
        overrule(found[0])


def _one_product_in_float32() -> None:
    """On the CPU ``mm_float32`` casts its operands; on a GPU it is one product, as here, wherever it was imported."""
    from nspec.kernels.common import products

    def mm_float32(a: Tensor, b: Tensor) -> Tensor:
        return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)

    replaced = products.mm_float32
    for name, module in list(sys.modules.items()):
        if name.startswith("nspec.") and getattr(module, "mm_float32", None) is replaced:
            module.mm_float32 = mm_float32  # type: ignore[attr-defined]
