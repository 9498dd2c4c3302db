"""The Triton kernel of ``write_neurons``; ``triton.py`` launches it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _put(
    weight_ptr,
    rows_ptr,
    index_ptr,
    neurons,
    numbers,
    height,
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
    there &= ((place >= 0) & (place < height))[:, None]  # nothing is written beside a weight
    if COLUMNS:
        target = weight_ptr + number.to(tl.int64)[None, :] * stride + place[:, None]
    else:
        target = weight_ptr + place[:, None] * stride + number[None, :]
    tl.store(target, rows.to(weight_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["neurons", "height0", "height1", "height2"])
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
    height0,
    height1,
    height2,
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
        _put(weight0_ptr, rows0_ptr, index0_ptr, neurons, numbers, height0, stride0, COLUMNS0, NEURONS, NUMBERS)
    elif matrix == 1:
        _put(weight1_ptr, rows1_ptr, index1_ptr, neurons, numbers, height1, stride1, COLUMNS1, NEURONS, NUMBERS)
    else:
        _put(weight2_ptr, rows2_ptr, index2_ptr, neurons, numbers, height2, stride2, COLUMNS2, NEURONS, NUMBERS)
