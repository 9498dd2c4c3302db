"""The Triton kernels of ``neuron_wgrad`` beside the product of ``common/kernels.py``; ``triton.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "columns", "width"])
def gather_kernel(
    dz_ptr,
    index_ptr,
    out_ptr,
    tokens,
    columns,
    width,
    stride,
    column_stride,
    out_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of a matrix of ``width``, beside one another, each number a load of its own; NaN where there is none."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (token < tokens)[:, None] & (column < columns)[None, :]
    neuron = tl.load(index_ptr + column, mask=column < columns, other=0)
    source = dz_ptr + token.to(tl.int64)[:, None] * stride + neuron[None, :] * column_stride
    target = out_ptr + token.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = (neuron >= 0) & (neuron < width)
    tl.store(target, tl.load(source, mask=there & inside[None, :], other=float("nan")), mask=there)


@triton.jit(do_not_specialize=["parts", "rows"])
def sum_kernel(
    parts_ptr,
    out_ptr,
    parts,
    rows,
    columns,
    part_stride,
    row_stride,
    out_stride,
    out_column_stride,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of the sum over parts, in their order, rounded once; ADD: of that and of what is there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    source = parts_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(parts):
        total += tl.load(source, mask=there, other=0.0)
        source += part_stride
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + column.to(tl.int64)[None, :] * out_column_stride
    if ADD:
        total += tl.load(out, mask=there, other=0.0).to(tl.float32)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=there)
