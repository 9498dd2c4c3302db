"""Triton: one launch for up to three matrices whose neurons have rows of one size, as gate, up and down have."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_launch import Launcher, Shipped, aligned, cdiv, launching, planned, pointer
from ..common.triton_tasks import DTYPES

_TILE = {"NEURONS": 16, "NUMBERS": 128, "num_warps": 4}
_MOST = 3


@triton.jit
def _put(
    weight_ptr,
    rows_ptr,
    index_ptr,
    neurons,
    numbers,
    stride,
    COLUMNS: tl.constexpr,
    NEURONS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    there = (neuron < neurons)[:, None] & (number < numbers)[None, :]
    rows = tl.load(rows_ptr + neuron.to(tl.int64)[:, None] * numbers + number[None, :], mask=there)
    place = tl.load(index_ptr + neuron, mask=neuron < neurons, other=0)
    if COLUMNS:
        target = weight_ptr + number.to(tl.int64)[None, :] * stride + place[:, None]
    else:
        target = weight_ptr + place[:, None] * stride + number[None, :]
    tl.store(target, rows.to(weight_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["neurons"])
def write_kernel(
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    rows0_ptr,
    rows1_ptr,
    rows2_ptr,
    index0_ptr,
    index1_ptr,
    index2_ptr,
    neurons,
    numbers,
    stride0,
    stride1,
    stride2,
    COLUMNS0: tl.constexpr,
    COLUMNS1: tl.constexpr,
    COLUMNS2: tl.constexpr,
    NEURONS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """A tile of the rows of one of three matrices."""
    matrix = tl.program_id(2)
    if matrix == 0:
        _put(weight0_ptr, rows0_ptr, index0_ptr, neurons, numbers, stride0, COLUMNS0, NEURONS, NUMBERS)
    elif matrix == 1:
        _put(weight1_ptr, rows1_ptr, index1_ptr, neurons, numbers, stride1, COLUMNS1, NEURONS, NUMBERS)
    else:
        _put(weight2_ptr, rows2_ptr, index2_ptr, neurons, numbers, stride2, COLUMNS2, NEURONS, NUMBERS)


def supports(
    weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]
) -> str | None:
    """None, or why these arguments are not taken."""
    for weight, mine, at in zip(weights, rows, index):
        for t in (weight, mine):
            if t.dtype not in DTYPES:
                return f"a dtype is {t.dtype}; it takes float32, bfloat16 and float16"
            if t.device.type == "cpu" and t.dtype == torch.bfloat16:
                return "Triton's interpreter rounds bfloat16 in another way"
        if weight.stride(1) != 1 or weight.layout is not torch.strided:
            return "the elements of a weight's row do not follow one another"
        if mine.device != weight.device or at.device != weight.device:
            return f"rows are on {mine.device} and an index on {at.device}, the weight on {weight.device}"
    return None


@planned
def _plan(device: torch.device, columns: tuple[bool, ...], *alike: Any) -> Launcher:
    return Launcher(write_kernel, {f"COLUMNS{i}": one for i, one in enumerate(columns)} | _TILE)


def write(weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]) -> None:
    """As the reference."""
    entries = [entry for entry in zip(weights, rows, index, columns) if entry[1].numel()]
    # Matrices of one launch have rows of one size and dtype.
    for _, group in itertools.groupby(entries, key=lambda entry: (entry[1].shape, entry[0].device)):
        some = list(group)
        for start in range(0, len(some), _MOST):
            _launch(some[start : start + _MOST])


def _launch(some: list[Any]) -> None:
    count = len(some)
    some += [some[0]] * (_MOST - count)  # pointers that no program takes
    weights = [weight for weight, _, _, _ in some]
    rows = [mine.contiguous() for _, mine, _, _ in some]
    index = [at.contiguous() for _, _, at, _ in some]
    neurons, numbers = rows[0].shape
    strides = [weight.stride(0) for weight in weights]
    alike = (
        *[t.dtype for t in (*weights, *rows)],
        *aligned(*weights, *rows, *index),
        *[(n % 16 == 0, n == 1, n >= 2**31) for n in (numbers, *strides)],
    )
    device = weights[0].device
    plan = _plan(device, tuple([bool(one) for _, _, _, one in some]), *alike)
    grid = (cdiv(neurons, _TILE["NEURONS"]), cdiv(numbers, _TILE["NUMBERS"]), count)
    launching(device, plan, grid, *weights, *rows, *index, neurons, numbers, *strides)


def shipped(target: str) -> list[Shipped]:
    """Every kernel and configuration that can be launched on a target."""
    found = []
    for weight, own in (
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        for label, columns in (("gate up down", (0, 0, 1)), ("rows", (0, 0, 0)), ("columns", (1, 1, 1))):
            signature = {f"weight{i}_ptr": pointer(weight) for i in range(_MOST)}
            signature |= {f"rows{i}_ptr": pointer(own) for i in range(_MOST)}
            signature |= {f"index{i}_ptr": "*i64" for i in range(_MOST)}
            signature |= {name: "i32" for name in ("neurons", "numbers", "stride0", "stride1", "stride2")}
            keywords = {f"COLUMNS{i}": bool(one) for i, one in enumerate(columns)} | _TILE
            divisible = tuple(name for name in signature if name != "neurons")
            names = [str(dtype).removeprefix("torch.") for dtype in (own, weight)]
            name = f"{label} {names[0]} to {names[1]}"
            found.append(Shipped(name, write_kernel, signature, keywords, divisible, covered=label != "gate up down"))
    return found
