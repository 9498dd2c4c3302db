"""How Triton kernels are launched here: for which target, and with which workspace.

A *target* names a family of devices that share block sizes (:func:`target_of`). Every launch goes through
:class:`Launcher`; ``tests/kernels/compiled`` records there what is launched for a target, and compiles it without a GPU.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton import knobs
from triton.runtime import driver

from . import checks, gpu

_RUNTIME = knobs.runtime
P = ParamSpec("P")
R = TypeVar("R")

PLANS = 1024  # kept for each pass of an operator: one for each layer's width and each task's number of active neurons
#: NVIDIA devices with 100 KB of shared memory for a program: 8.6, 8.9 and 12.x. The oldest gives the name.
SMALL = "cuda:86"
INTERPRETER = "interpreter"


@functools.cache
def _target_of(kind: str, index: int) -> str:
    if gpu.interpreted():
        return INTERPRETER
    if torch.version.hip is not None:
        return "hip:gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) in ((8, 0), (8, 7)):
        return "cuda:80"
    if major == 8 or major >= 12:
        return SMALL
    return "cuda:90" if major == 9 else "cuda:100"


def _index(device: torch.device) -> int:
    if device.type == "cpu":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index


def target_of(device: torch.device) -> str:
    """The target whose configurations run on ``device``.

    The interpreter has its own; ROCm devices share gfx942's; an NVIDIA device has that of the nearest compute capability
    not above its own, except those with 100 KB of shared memory (8.6, 8.9, 12.x), which have ``SMALL``.
    """
    return _target_of(device.type, _index(device))


@functools.cache
def _processors(kind: str, index: int) -> int:
    # Few in the interpreter, so that one program has several tiles, as on a device.
    return 3 if kind == "cpu" else torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """How many programs run side by side when each fills a multiprocessor: the grid of a persistent kernel."""
    return _processors(device.type, _index(device))


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own takes a hundred times as long on the host (3.6, 3.7), 25 times in a block."""
    return -(-a // b)


class Launcher:
    """A kernel and the keywords of its launches. After the first, it goes around Triton's dispatch of their arguments.

    So it is for launches that differ in nothing that Triton compiles for: which arguments are None, their dtypes, which
    addresses are multiples of 16, which integers are 1, multiples of 16 or beyond 32 bits (``do_not_specialize`` leaves the
    last alone). A plan that is kept by all of these (:func:`planned`) keeps its launchers.

    Args:
        kernel: the function under ``triton.jit``; its constants stand behind all other arguments.
        keywords: of each launch: the constants, and the compiler's options.
    """

    __slots__ = ("_compiled", "_constants", "kernel", "keywords")

    def __init__(self, kernel: Any, keywords: Mapping[str, Any]) -> None:
        self.kernel, self.keywords, self._compiled = kernel, dict(keywords), None
        constants = [name for name in kernel.arg_names if name in keywords]
        assert kernel.arg_names[len(kernel.arg_names) - len(constants) :] == constants, kernel.arg_names
        self._constants = tuple(keywords[name] for name in constants)

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launches on the current device and stream; inside :func:`launching` alone."""
        compiled = self._compiled
        if compiled is None:
            # The interpreter compiles nothing and gives None.
            self._compiled = self.kernel.run(*args, grid=grid, warmup=False, **self.keywords)
        elif not (_hooks(_RUNTIME.launch_enter_hook) or _hooks(_RUNTIME.launch_exit_hook)):
            # What compiled[grid](...) does, in a quarter of its time; the three None are the hooks and what they read.
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            run, function = compiled.run, compiled.function
            run(*grid, stream, function, compiled.packed_metadata, None, None, None, *args, *self._constants)
        else:
            compiled[grid](*args, *self._constants)


def _hooks(chain: Any) -> Any:
    """The hooks of a profiler in one of Triton's chains, if any."""
    return getattr(chain, "calls", chain)


def launching(device: torch.device, function: Callable[P, R], *args: P.args, **keywords: P.kwargs) -> R:
    """Calls a function that launches on ``device``.

    Kernels that make tensor descriptors get their workspace from PyTorch's allocator; a user's ``triton.set_allocator``
    holds again afterwards.
    """
    # set_allocator sets a context variable and has no inverse, hence a context of its own.
    return contextvars.copy_context().run(_launching, device, function, args, keywords)


def _launching(device: torch.device, function: Callable[..., R], args: Sequence[Any], keywords: Mapping[str, Any]) -> R:
    triton.set_allocator(_allocator(device))
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            return function(*args, **keywords)
    return function(*args, **keywords)


@functools.cache
def _allocator(device: torch.device) -> Any:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)  # PyTorch aligns to 512 bytes, descriptors need 128

    return allocate


def planned(make: Callable[..., R]) -> Callable[..., R]:
    """Keeps what ``make`` gives for each combination of its arguments, for launches of calls alike."""
    return functools.lru_cache(maxsize=PLANS)(make)


def aligned(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which tensors begin at multiples of 16 bytes, for the key of a plan."""
    return tuple([t is None or t.data_ptr() % 16 == 0 for t in tensors])


def stream_of(device: torch.device) -> int:
    """The current stream of a device as a number; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    stream: int = torch._C._cuda_getCurrentRawStream(_index(device))
    return stream


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: TF32 for float32 where PyTorch's own products may use it, else ``ieee``.

    On ROCm always ``ieee``: few of its devices have it, and PyTorch uses it there only behind a further setting.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # allow_tf32 cannot be read any more once a user has set fp32_precision (PyTorch 2.9).
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def unit(dtype: torch.dtype) -> int:
    """Elements in 16 bytes: what a descriptor's row stride is a multiple of, and what one wide access moves."""
    return 16 // dtype.itemsize


def padded(size: int, dtype: torch.dtype) -> int:
    """``size`` elements, rounded up to whole 16 bytes."""
    return -(-size // unit(dtype)) * unit(dtype)


def rows16(matrix: Tensor) -> Tensor:
    """``matrix [rows, columns]`` as tensor descriptors and wide loads need it: every row begins at a multiple of 16 bytes.

    Returns:
        ``matrix`` itself, also when it is a view with wider rows, if it fits; else a copy ``[rows, padded(columns)]``
        whose further columns are zero, so that they add nothing to a product. A copy moves each element twice, little
        beside a matrix product.
    """
    rows, columns = matrix.shape
    step = 16 // matrix.dtype.itemsize
    stride, column_stride = matrix.stride()
    # The stride of a single row says nothing, yet becomes a descriptor's: it has to reach over the row.
    spaced = column_stride == 1 and stride % step == 0 and stride >= columns
    if spaced and columns % step == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    width = padded(columns, matrix.dtype)
    copy = matrix.new_empty((rows, width))
    copy[:, :columns] = matrix
    copy[:, columns:] = 0
    return copy


class _Copy(NamedTuple):
    offsets: Tensor
    numbers: list[int]


#: By the offsets on the CPU: their copies, by device and stream. A batch's offsets serve every layer, forward and backward.
_copies: MutableMapping[Tensor, dict[tuple[torch.device, int], _Copy]] = WeakTensorKeyDictionary()


def offsets_on(task_offsets: Tensor, tokens: int, device: torch.device) -> Tensor:
    """``task_offsets`` int64 ``[tasks + 1]`` on ``device``, without waiting for the device; copied once.

    Raises:
        ValueError: they are on the CPU and do not rise from 0 to ``tokens``. On a device nobody looks: that would wait.
    """
    if (
        task_offsets.device.type != "cpu"
        or device.type != "cuda"
        or task_offsets.is_inference()
        or torch.cuda.is_current_stream_capturing()  # a graph holds addresses and no references
    ):
        return _copy(task_offsets, tokens, device)
    copies = _copies.setdefault(task_offsets, {})
    key = device, stream_of(device)
    known, numbers = copies.get(key), task_offsets.tolist()
    if known is None or known.numbers != numbers or numbers[-1] != tokens:  # not every write raises the version
        known = copies[key] = _Copy(_copy(task_offsets, tokens, device), numbers)
    return known.offsets


def _copy(task_offsets: Tensor, tokens: int, device: torch.device) -> Tensor:
    if task_offsets.device.type == "cpu":
        checks.segments(task_offsets, tokens)
    return task_offsets.to(device=device, dtype=torch.int64, non_blocking=True).contiguous()
