"""The Triton kernels of ``linear_relu_count``; ``triton.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.kernels import tile_order


@triton.jit(do_not_specialize=["tokens", "d_ff", "inner", "h_row", "x_row", "w_row"])
def forward_kernel(
    x,
    weight,
    bias,
    valid,
    tile_task,
    h,
    counts,
    tokens,
    d_ff,
    inner,
    h_row,
    x_row,
    w_row,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    # inner and the row strides count units of 16 bytes: multiplied here, the compiler knows that they are multiples of
    # that and reads 16 bytes at a time. It compiles once for all sizes.
    d_in = inner * UNIT
    w_tiles = tl.make_tensor_descriptor(
        weight, shape=[d_ff, d_in], strides=[w_row.to(tl.int64) * UNIT, 1], block_shape=[BM, BK]
    )
    x_tiles = tl.make_tensor_descriptor(
        x, shape=[tokens, d_in], strides=[x_row.to(tl.int64) * UNIT, 1], block_shape=[BN, BK]
    )
    h_tiles = tl.make_tensor_descriptor(
        h, shape=[tokens, h_row * UNIT], strides=[h_row.to(tl.int64) * UNIT, 1], block_shape=[BN, BM]
    )
    rows = tl.cdiv(d_ff, BM)
    columns = tl.cdiv(tokens, BN)
    steps = tl.cdiv(d_in, BK)
    programs = tl.num_programs(0)
    # The loop is flattened into one over all steps of all tiles. What follows the product runs while the next tile's
    # operands are on their way, and needs the number of its own tile.
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), rows * columns, programs, flatten=FLATTEN):
        row, column = tile_order(tile, rows, columns, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(steps):
            a = w_tiles.load([row * BM, k * BK])
            b = x_tiles.load([column * BN, k * BK])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        done += programs
        row, column = tile_order(done, rows, columns, GROUP)
        neuron = row * BM + tl.arange(0, BM)
        token = column * BN + tl.arange(0, BN)
        if HAS_BIAS:
            acc += tl.load(bias + neuron, mask=neuron < d_ff, other=0.0).to(tl.float32)[:, None]
        # torch.relu(NaN) is NaN; by default tl.maximum gives 0.
        out = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL).to(h.dtype.element_ty)
        h_tiles.store([column * BN, row * BM], tl.trans(out))
        counted = token < tokens
        if HAS_VALID:
            counted &= tl.load(valid + token, mask=counted, other=0) != 0
        n = tl.sum(((out.to(tl.float32) > 0) & counted[None, :]).to(tl.int32), axis=1).to(tl.int64)
        if HAS_TASKS:
            # No loop over the tasks of a tile here: the compiler cannot flatten a loop that holds another region.
            task = tl.load(tile_task + column)
            counts_of = counts + tl.maximum(task, 0).to(tl.int64) * d_ff
            tl.atomic_add(counts_of + neuron, n, mask=(neuron < d_ff) & (task >= 0), sem="relaxed")
        else:
            tl.atomic_add(counts + neuron, n, mask=neuron < d_ff, sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "tasks", "columns"])
def tile_tasks_kernel(offsets, tile_task, tokens, tasks, columns, BN: tl.constexpr, BLOCK: tl.constexpr):
    """For each tile of BN tokens the task that all its tokens belong to, or -1 where they belong to several."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tile * BN
    after = tl.zeros((BLOCK,), tl.int32)
    for task in range(1, tasks):
        after += (tl.load(offsets + task) <= begin).to(tl.int32)
    stop = tl.load(offsets + after + 1, mask=tile < columns, other=0)
    tl.store(tile_task + tile, tl.where(stop >= tl.minimum(begin + BN, tokens), after, -1), mask=tile < columns)


@triton.jit(do_not_specialize=["tokens", "d_ff", "h_row"])
def count_straddling_kernel(
    h,
    valid,
    offsets,
    counts,
    tokens,
    d_ff,
    h_row,
    BN: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds to the counts of task ``program_id(0)`` its tokens in tiles that it shares with other tasks.

    Those are tokens up to the first multiple of BN and from the last one: no other program touches these counts.
    """
    task = tl.program_id(0)
    # Offsets on a device are not checked. Wrong ones give wrong counts, but nothing outside h is read.
    begin = tl.maximum(tl.load(offsets + task), 0).to(tl.int32)
    end = tl.minimum(tl.load(offsets + task + 1), tokens).to(tl.int32)
    # A tile that ends with the last token is shared only if the task begins within it.
    head = tl.minimum(tl.cdiv(begin, BN) * BN, end)
    tail = tl.where(end < tokens, tl.maximum(end // BN * BN, head), end)
    neuron = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = neuron < h_row * UNIT
    n = tl.zeros((COLUMNS,), tl.int32)
    for part in range(2):
        start = tl.where(part == 0, begin, tail)
        stop = tl.where(part == 0, head, end)
        for at in range(start, stop, ROWS):
            token = at + tl.arange(0, ROWS)
            counted = token < stop
            rows = h + token.to(tl.int64)[:, None] * (h_row.to(tl.int64) * UNIT)
            value = tl.load(rows + neuron[None, :], mask=counted[:, None] & inside[None, :], other=0.0)
            if HAS_VALID:
                counted &= tl.load(valid + token, mask=counted, other=0) != 0
            n += tl.sum(((value.to(tl.float32) > 0) & counted[:, None]).to(tl.int32), axis=0)
    place = counts + task.to(tl.int64) * d_ff + neuron
    keep = neuron < d_ff
    tl.store(place, tl.load(place, mask=keep, other=0) + n.to(tl.int64), mask=keep)
