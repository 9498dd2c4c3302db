"""What is launched for a target, without a GPU: the operators run on small tensors, and launches are noted, not made.

Every launch goes through ``Launcher``, which is replaced here. ``CALLS`` are calls of every kind that the operators tell
apart; ``test_compiled.py`` wants every kernel among their launches, and ``test_launcher.py`` those of random calls.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import JITFunction
from triton._utils import canonicalize_dtype

import nspec.kernels
from nspec.kernels.common import products, triton_launch
from nspec.kernels.common.active import active_index

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
#: What the machine code must have beside no spills, see ``test_compiled.py``. Products by the dtype of their operands.
PRODUCTS = ("common/product", "common/from_neurons", "compact_ffn/to_neurons", "linear_relu_count/forward")
STREAMS = ("gated_activation/forward", "gated_activation/backward")


@dataclass(frozen=True)
class Recorded:
    """One kernel as it is launched on a target.

    Attributes:
        kernel: the function under ``triton.jit``.
        signature: Triton type of each argument that is no constant: ``"*bf16"``, ``"i32"``.
        constants: the value of each other argument: of constexprs, None, and integers that are 1.
        options: of the compiler.
        divisible: arguments that are multiples of 16.
    """

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    divisible: tuple[str, ...]

    @property
    def function(self) -> str:
        """``"compact_ffn/to_neurons"``."""
        return f"{self.kernel.__module__.split('.')[-2]}/{self.kernel.__name__.removesuffix('_kernel')}"

    @property
    def name(self) -> str:
        """The function, the types of what it reads and writes, what is switched on, and the sizes of blocks."""
        types = [kind[1:] for kind in self.signature.values() if kind in ("*fp32", "*bf16", "*fp16")]
        words = ["-".join([*types, *(str(self.constants[name]) for name in "PGMVW" if self.constants.get(name))])]
        flags = [name.lower() for name in self.flags]
        words += [value for value in self.constants.values() if isinstance(value, str)]
        words += ["x".join(str(v) for name, v in self.constants.items() if name.isupper() and type(v) is int)]
        ones = [f"{name}=1" for name, value in self.constants.items() if name.islower() and value == 1]
        return " ".join(filter(None, [self.function, *words, *flags, *ones]))

    @property
    def flags(self) -> list[str]:
        """The constants that are True."""
        return [name for name, value in self.constants.items() if value is True]

    @property
    def expect(self) -> tuple[str, ...]:
        """``product16``, ``product32``, ``count``, ``stream``, ``unfused``: rules of ``test_compiled.py``."""
        if self.function in PRODUCTS:
            half = "*fp32" not in list(self.signature.values())[:2]
            counts = ("count",) if half and self.function == "linear_relu_count/forward" else ()
            return (*counts, "product16" if half else "product32")
        if self.function == "row_sparse_adamw/adamw":
            if self.constants["W"] is not None:  # the same arithmetic, and a weight that is written number by number
                return ()
            return ("stream", "unfused") if self.constants["WIDE"] > 1 else ("unfused",)
        return ("stream",) if self.function in STREAMS else ()

    def covers(self, other: Recorded) -> bool:
        """Whether this is the same kernel with more switched on, or in bfloat16 what the other is in float16.

        A product of one task is never covered by that of several.
        """
        if self.kernel is not other.kernel or self.options != other.options or self._sizes != other._sizes:
            return False
        mine, theirs = set(self.flags), set(other.flags)
        if "GROUPED" in mine ^ theirs and self.function in PRODUCTS:
            return False
        types = {name: kind.replace("fp16", "bf16") for name, kind in other.signature.items()}
        return self.signature.items() >= types.items() and (
            mine > theirs or (mine == theirs and types != other.signature)
        )

    @property
    def _sizes(self) -> dict[str, Any]:
        return {name: value for name, value in self.constants.items() if type(value) is not bool and value is not None}


def described(launcher: triton_launch.Launcher, args: tuple[Any, ...]) -> Recorded:
    """What Triton compiles for a launch with these arguments."""
    kernel, keywords = launcher.kernel, launcher.keywords
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {name: value for name, value in keywords.items() if name not in OPTIONS}
    divisible = []
    for param, value in zip(kernel.params, args):
        if value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            constants[param.name] = value
            continue
        if isinstance(value, Tensor):
            kind, number = "*" + canonicalize_dtype(str(value.dtype).removeprefix("torch.")), value.data_ptr()
        else:
            kind, number = ("fp32", 1) if isinstance(value, float) else ("i32" if value < 2**31 else "i64", value)
        signature[param.name] = kind
        if number % 16 == 0 and not param.do_not_specialize:
            divisible.append(param.name)
    options = {name: value for name, value in keywords.items() if name in OPTIONS}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    return Recorded(kernel, signature, constants, options, tuple(divisible))


def _module(operator: str) -> Any:
    return importlib.import_module(f"nspec.kernels.{operator}.triton")


def _sets(d_ff: int, tasks: int, in_place: bool) -> tuple[Tensor, Tensor | None]:
    """An index, and the offsets where there are several tasks."""
    active = torch.arange(d_ff).expand(tasks, d_ff) < (d_ff if in_place else d_ff // 2)
    return active_index(active), None if tasks == 1 else torch.tensor([0, *[16] * (tasks - 1), 64])


def _compact_ffn(dtype: torch.dtype, tasks: int, biases: bool, in_place: bool) -> None:
    ffn, (index, offsets) = _module("compact_ffn"), _sets(256, tasks, in_place)
    x = torch.zeros(64, 64, dtype=dtype)
    for given in dict.fromkeys((dtype, torch.float32)):
        w1, w2, b1, b2 = (torch.zeros(shape, dtype=given) for shape in ((256, 64), (64, 256), 256, 64))
        bias = (b1, b2) if biases else (None, None)
        _, kept = ffn.forward(x, w1, bias[0], w2, bias[1], index, offsets)
        ffn.backward(x, x, w1, bias[0], w2, index, offsets, *kept)
        ffn.backward(x, x, w1, bias[0], w2, index, offsets, kept[0])


def _compact_layers(dtype: torch.dtype, tasks: int, biases: bool, in_place: bool) -> None:
    fc1, fc2, (index, offsets) = _module("compact_fc1"), _module("compact_fc2"), _sets(256, tasks, in_place)
    x, w, w2 = (torch.zeros(shape, dtype=dtype) for shape in ((64, 64), (256, 64), (64, 256)))
    bias, constant, h = torch.zeros(256, dtype=dtype), torch.zeros(1, 256, dtype=dtype), x.new_zeros(64, index.shape[1])
    fc1.forward(x, w, bias if biases else None, index, offsets)
    fc1.backward(h, x, w, index, offsets, biases)
    fc2.forward(h, constant if biases else None, w2, None, index, offsets)
    fc2.backward(x, h, constant if biases else None, w2, index, offsets, biases)


def _row_sparse_wgrad(dtype: torch.dtype, tasks: int, d_in: int, in_place: bool) -> None:
    wgrad, (index, offsets) = _module("row_sparse_wgrad"), _sets(256, tasks, in_place)
    dh, x = torch.zeros(64, 256, dtype=dtype), torch.zeros(64, d_in, dtype=dtype)
    for result in dict.fromkeys((dtype, torch.float32)):
        wgrad.forward(dh, x, index, offsets, dtype=result)
    wgrad.accumulate(torch.zeros(256, d_in), dh, x, index, offsets)


def _linear_relu_count(dtype: torch.dtype, tokens: int, d_ff: int, full: bool) -> None:
    x, w, b = (torch.zeros(shape, dtype=dtype) for shape in ((tokens, 64), (d_ff, 64), d_ff))
    rest = (b, torch.ones(tokens, dtype=torch.bool), torch.tensor([0, 16, tokens])) if full else (None, None, None)
    _module("linear_relu_count").forward(x, w, *rest)


def _gated_activation(dtype: torch.dtype, kind: str) -> None:
    gate = torch.zeros(64, 64, dtype=dtype)
    _module("gated_activation").forward(gate, gate, kind)
    _module("gated_activation").backward(gate, gate, gate, kind)
    _module("gated_activation").gradients(gate, gate, gate, kind, torch.arange(8))


def _neuron_wgrad(dtype: torch.dtype, k: int, add: bool) -> None:
    wgrad, dz, x = _module("neuron_wgrad"), torch.zeros(64, 256, dtype=dtype), torch.zeros(64, 64, dtype=dtype)
    for result in dict.fromkeys((dtype, torch.float32)):
        if add:
            wgrad.accumulate(torch.zeros(k, 64, dtype=result), dz, x, torch.arange(k))
        else:
            wgrad.forward(dz, x, torch.arange(k), result)


def _write_neurons(weight: torch.dtype, own: torch.dtype, columns: tuple[bool, ...]) -> None:
    weights, rows = (
        [torch.zeros(size, 64, dtype=dtype) for _ in range(3)] for size, dtype in ((64, weight), (16, own))
    )
    _module("write_neurons").write(weights, rows, [torch.arange(16)] * 3, columns)


def _row_sparse_adamw(param: torch.dtype, grad: torch.dtype, moments: torch.dtype, width: int) -> None:
    dtypes, options = (
        (param, grad, moments, moments),
        {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0},
    )
    lists = [[torch.zeros(64, width, dtype=dtype)] for dtype in dtypes]
    _module("row_sparse_adamw").row_sparse_adamw_(*lists, [torch.ones(64, dtype=torch.bool)], step=1, **options)
    if len({*dtypes}) > 1:
        return
    for weight in dict.fromkeys((param, torch.bfloat16)):
        writes = [(torch.zeros(64, width, dtype=weight), torch.arange(64), False)]
        _module("row_sparse_adamw").row_sparse_adamw_(*lists, [None], step=1, writes=writes, **options)


def _calls() -> Iterator[functools.partial[None]]:
    of = functools.partial
    f32, b16 = torch.float32, torch.bfloat16
    for dtype, tasks, more, in_place in itertools.product((b16, f32), (1, 2), (True, False), (True, False)):
        yield of(_compact_ffn, dtype, tasks, more, in_place)
        yield of(_compact_layers, dtype, tasks, more, in_place)
        # One task is packed where d_in is large.
        yield of(_row_sparse_wgrad, dtype, tasks, 1024 if more else 64, in_place)
    for dtype, (tokens, d_ff), full in itertools.product(
        (b16, f32, torch.float16), ((1024, 512), (32, 32)), (True, False)
    ):
        yield of(_linear_relu_count, dtype, tokens, d_ff, full)
    for dtype, kind in itertools.product((b16, f32), ("silu", "gelu", "gelu_tanh", "relu")):
        yield of(_gated_activation, dtype, kind)
    for dtype, k, add in itertools.product((b16, f32), (16, 144), (True, False)):
        yield of(_neuron_wgrad, dtype, k, add)
    for dtypes in ((b16, f32), (b16, b16), (f32, f32)):
        for columns in ((False, False, True), (False,) * 3, (True,) * 3):
            yield of(_write_neurons, *dtypes, columns)
    for dtypes in ((f32, f32, f32), (f32, b16, f32), (b16, b16, f32), (b16, b16, b16)):
        for width in (64, 63):
            yield of(_row_sparse_adamw, *dtypes, width)


CALLS = tuple(_calls())


def _forget() -> None:
    """Drops the plans of another target."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nspec.kernels."):
            for kept in list(vars(module).values()):
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()
    _module("row_sparse_adamw")._kept.clear()


@functools.cache
def recorded(target: str) -> list[Recorded]:
    """Every kernel that the calls launch on a target, once; with TF32 and without, where the target has it."""
    found: list[Recorded] = []

    def note(self: triton_launch.Launcher, grid: Any, *args: Any) -> None:
        found.append(described(self, args))

    # Offsets of tasks on the device, which the library cannot read.
    on_device = dict.fromkeys(products.LIBRARY_FLOAT32, products.ONE_TASK)
    hip = target.startswith("hip")
    with (
        mock.patch.object(triton_launch.Launcher, "__call__", note),
        mock.patch.object(triton_launch, "_target_of", return_value=target),
        mock.patch.dict(products.LIBRARY_FLOAT32, on_device),
        mock.patch.object(torch.version, "hip", "6" if hip else None),
    ):
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            for precision in ("ieee",) if hip else ("ieee", "tf32"):
                torch.backends.cuda.matmul.fp32_precision = precision
                _forget()
                for call in CALLS:
                    call()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
            _forget()
    unique: dict[str, Recorded] = {}
    for one in found:
        known = unique.setdefault(one.name, one)
        if known != one:
            raise ValueError(f"{target}: two kernels have the name {one.name!r}: {known} and {one}")
    return sorted(unique.values(), key=lambda one: one.name)


def defined() -> set[str]:
    """The functions of all kernels that there are, as :attr:`Recorded.function`."""
    found = set()
    for package in pkgutil.iter_modules(nspec.kernels.__path__):
        with_kernels = importlib.util.find_spec(f"nspec.kernels.{package.name}.kernels") if package.ispkg else None
        if with_kernels is None:
            continue
        for name, value in vars(importlib.import_module(with_kernels.name)).items():
            if name.endswith("_kernel") and value.__module__ == with_kernels.name:
                found.add(f"{package.name}/{name.removesuffix('_kernel')}")
    return found
