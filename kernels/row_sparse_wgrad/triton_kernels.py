"""The Triton kernels of ``row_sparse_wgrad``; ``triton.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton_tasks import task_end, token_tile
from ..common.triton_tile import tile_order


@triton.jit(do_not_specialize=["tokens", "tasks", "chunk"])
def product_kernel(
    left_ptr,
    right_ptr,
    parts_ptr,
    offsets_ptr,
    tokens,
    tasks,
    chunk,
    width,
    columns,
    left_stride,
    right_stride,
    GROUPED: tl.constexpr,
    TMA: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of ``leftᵀ right`` over one chunk of tokens, with left ``[tokens, width]``, right ``[tokens, columns]``."""
    down, across = tl.cdiv(width, M), tl.cdiv(columns, N)
    part = tl.program_id(0) // (down * across)
    _, first, stop = token_tile(offsets_ptr, part, chunk, tokens, tasks, GROUPED)
    if first < stop:
        row, column = tile_order(tl.program_id(0) % (down * across), down, across, GROUP)
        total = tl.zeros((M, N), tl.float32)
        last = min(stop, first + chunk)
        # What is behind the task's last token reads as zero, so that no other task's tokens enter the sum.
        right = tl.make_tensor_descriptor(
            right_ptr, shape=[stop, columns], strides=[right_stride, 1], block_shape=[K, N]
        )
        if TMA:
            left = tl.make_tensor_descriptor(
                left_ptr, shape=[stop, width], strides=[left_stride, 1], block_shape=[K, M]
            )
            for token in range(first, last, K):
                block = left.load([token, row * M])
                total = tl.dot(block.T, right.load([token, column * N]), total, input_precision=PRECISION)
        else:
            # Without TMA the compiler copies a block that it has to transpose through registers, not asynchronously.
            neuron = row * M + tl.arange(0, M)
            for token in range(first, last, K):
                k = token + tl.arange(0, K)
                source = left_ptr + k.to(tl.int64)[None, :] * left_stride + neuron[:, None]
                block = tl.load(source, mask=(neuron < width)[:, None] & (k < stop)[None, :], other=0.0)
                total = tl.dot(block, right.load([token, column * N]), total, input_precision=PRECISION)
        # Parts are padded to whole blocks: no masks, so that the stores stay 16 bytes wide.
        m = part.to(tl.int64) * (down * M) + row * M + tl.arange(0, M)
        n = column * N + tl.arange(0, N)
        tl.store(parts_ptr + m[:, None] * (across * N) + n[None, :], total)


@triton.jit(do_not_specialize=["tokens", "tasks", "chunk"])
def expand_kernel(
    parts_ptr,
    places_ptr,
    offsets_ptr,
    bias_ptr,
    sums_ptr,
    out_ptr,
    tokens,
    tasks,
    chunk,
    neurons,
    columns,
    part_stride,
    row_stride,
    out_stride,
    out_column_stride,
    GROUPED: tl.constexpr,
    CONSTANT: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of the result from the parts of all tasks, zero where no task has the neuron.

    WHOLE: the parts have a row for every neuron, not for every place. CONSTANT: where a task has not the neuron, it adds
    ``relu(bias[neuron]) sums[task]``, its rank-one part (see ``compact_ffn/reference.py``). ADD: adds to what is there, and
    leaves the rows that no task has.
    """
    neuron = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, real = neuron < neurons, (column < columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    owned = tl.zeros((ROWS,), tl.int32)
    part = tl.zeros((), tl.int64)
    start = tl.zeros((), tl.int32)
    if CONSTANT:
        bias = tl.load(bias_ptr + neuron, mask=there, other=0.0).to(tl.float32)
        output = tl.maximum(bias, 0.0, propagate_nan=tl.PropagateNan.ALL)[:, None]
    for task in range(tasks):
        stop = task_end(offsets_ptr, task, start, tokens, GROUPED)
        place = tl.load(places_ptr + tl.cast(task, tl.int64) * neurons + neuron, mask=there, other=-1)
        has = (place >= 0)[:, None]
        row = neuron if WHOLE else place
        row_ptr = parts_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        for _ in range(tl.cdiv(stop - start, chunk)):
            total += tl.load(row_ptr + part * part_stride, mask=has & real, other=0.0).to(tl.float32)
            part += 1
        start = stop
        if CONSTANT:
            s = tl.load(sums_ptr + tl.cast(task, tl.int64) * columns + column, mask=column < columns, other=0.0)
            total += tl.where(has, 0.0, output * s[None, :])
        owned = tl.where(place >= 0, 1, owned)
    out = out_ptr + neuron.to(tl.int64)[:, None] * out_stride + column.to(tl.int64)[None, :] * out_column_stride
    if ADD:
        write = there[:, None] & (owned > 0)[:, None] & real
        tl.store(out, tl.load(out, mask=write, other=0.0) + total, mask=write)
    else:
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=there[:, None] & real)
