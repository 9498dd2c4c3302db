"""The Triton kernels that several operators launch, and the functions that kernels call.

The tokens of each task are cut into tiles of their own, so that no tile has tokens of two tasks. How many tiles there are
depends on the offsets, which may be on the device and are never read by the host: grids come from ``Tasks.most_tiles``, an
upper bound, and a program finds its tile by :func:`token_tile`. The order of every sum follows from the offsets alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_order(tile, rows, columns, GROUP: tl.constexpr):
    """The row and column of the ``tile``-th of ``rows x columns`` tiles, going through GROUP rows of tiles together.

    Tiles that run at the same time then share operands, which stay in the L2 cache.
    """
    in_group = GROUP * columns
    first = tile // in_group * GROUP
    height = min(rows - first, GROUP)
    within = tile % in_group
    return first + within % height, within // height


@triton.jit
def task_end(offsets_ptr, task, start, tokens, GROUPED: tl.constexpr):
    """The first token behind a task whose first is ``start``: 0, or the end of the task before."""
    if GROUPED:
        # Offsets on a device are not checked. Wrong ones give wrong numbers, but whatever they are, tasks follow one
        # another within the tokens and have no more tiles than Tasks.most_tiles: nothing outside the tensors is touched.
        # In 32 bits, which take fewer registers: clamped, it does not matter what the upper half was.
        return tl.minimum(tl.maximum(tl.load(offsets_ptr + task + 1).to(tl.int32), start), tokens)
    else:
        return tokens


@triton.jit
def token_tile(offsets_ptr, tile, size, tokens, tasks, GROUPED: tl.constexpr):
    """The task of a tile of ``size`` tokens, its first token, and the first token behind the task.

    Beyond the last tile, the first token is not below the one behind the task.
    """
    if GROUPED:
        task = tl.zeros((), tl.int32)
        start = tl.zeros((), tl.int32)
        stop = task_end(offsets_ptr, task, start, tokens, GROUPED)
        count = tl.cdiv(stop - start, size)
        while (tile >= count) & (task < tasks - 1):
            tile -= count
            task += 1
            start = stop
            stop = task_end(offsets_ptr, task, start, tokens, GROUPED)
            count = tl.cdiv(stop - start, size)
        return task, start + tile * size, stop
    else:
        return tl.zeros((), tl.int32), tile * size, tokens


@triton.jit
def tiles_before(offsets_ptr, task, size, tokens, GROUPED: tl.constexpr):
    """How many tiles the tasks before ``task`` have, and the first token behind them."""
    count = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    if GROUPED:
        for earlier in range(task):
            stop = task_end(offsets_ptr, earlier, start, tokens, GROUPED)
            count += tl.cdiv(stop - start, size)
            start = stop
    return count, start


@triton.jit(do_not_specialize=["tokens", "tasks"])
def pack_columns_kernel(
    dense_ptr,
    packed_ptr,
    sums_ptr,
    index_ptr,
    places_ptr,
    offsets_ptr,
    tokens,
    tasks,
    columns,
    width,
    dense_stride,
    packed_stride,
    GROUPED: tl.constexpr,
    PACK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of tokens, one block of columns: their sums over the tokens, and the active ones among them, compact."""
    tile = tl.program_id(0)
    task, first, stop = token_tile(offsets_ptr, tile, TOKENS, tokens, tasks, GROUPED)
    token = first + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < columns
    there = (token < stop)[:, None]
    row_ptr = dense_ptr + token.to(tl.int64)[:, None] * dense_stride
    dense = tl.load(row_ptr + column[None, :], mask=there & real[None, :], other=0.0)
    tl.store(sums_ptr + tile.to(tl.int64) * columns + column, tl.sum(dense.to(tl.float32), axis=0), mask=real)
    if PACK:
        # The active columns of the block have neighbouring places. They are read again, place by place (the cache has
        # them): so both the reads and the writes of a warp fall into few lines.
        place = tl.load(places_ptr + task.to(tl.int64) * columns + column, mask=real, other=-1)
        target = tl.min(tl.where(place < 0, width, place)) + tl.arange(0, COLUMNS)
        wanted = target <= tl.max(place)
        neuron = tl.load(index_ptr + task.to(tl.int64) * width + target, mask=wanted, other=-1)
        picked = tl.load(row_ptr + neuron[None, :], mask=there & (neuron >= 0)[None, :], other=0.0)
        packed = packed_ptr + token.to(tl.int64)[:, None] * packed_stride + target[None, :]
        tl.store(packed, picked, mask=there & wanted[None, :])


@triton.jit(do_not_specialize=["tokens", "size"])
def task_sums_kernel(
    sums_ptr,
    out_ptr,
    offsets_ptr,
    tokens,
    columns,
    size,
    GROUPED: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of a task's tiles, in their order."""
    task = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = (column < columns)[None, :]
    first, start = tiles_before(offsets_ptr, task, size, tokens, GROUPED)
    stop = task_end(offsets_ptr, task, start, tokens, GROUPED)
    last = first + tl.cdiv(stop - start, size)
    total = tl.zeros((TILES, COLUMNS), tl.float32)
    for begin in range(first, last, TILES):
        tile = begin + tl.arange(0, TILES)
        part = sums_ptr + tile.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(part, mask=(tile < last)[:, None] & real, other=0.0)
    tl.store(out_ptr + task.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


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


@triton.jit(do_not_specialize=["tokens", "tasks"])
def from_neurons_kernel(
    in_ptr,
    weight_ptr,
    constant_ptr,
    out_ptr,
    offsets_ptr,
    tokens,
    tasks,
    width,
    columns,
    GROUPED: tl.constexpr,
    CONSTANT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out [tokens, columns] = in weight + constant``; in ``[tokens, width]``, constant float32 ``[tasks, columns]``."""
    inputs = tl.make_tensor_descriptor(in_ptr, shape=[tokens, width], strides=[width, 1], block_shape=[M, K])
    weight = tl.make_tensor_descriptor(
        weight_ptr, shape=[tasks * width, columns], strides=[columns, 1], block_shape=[K, N]
    )
    out = tl.make_tensor_descriptor(out_ptr, shape=[tokens, columns], strides=[columns, 1], block_shape=[M, N])
    if GROUPED:
        tiles, _ = tiles_before(offsets_ptr, tasks, M, tokens, GROUPED)
    else:
        tiles = tl.cdiv(tokens, M)
    across = tl.cdiv(columns, N)
    for item in range(tl.program_id(0), tiles * across, tl.num_programs(0)):
        tile, block = tile_order(item, tiles, across, GROUP)
        task, first, stop = token_tile(offsets_ptr, tile, M, tokens, tasks, GROUPED)
        total = tl.zeros((M, N), tl.float32)
        # Counted along: from task * width + k the compiler for gfx942 reads "in" 2 bytes at a time (Triton 3.6).
        row = task * width
        for k in range(0, width, K):
            right = weight.load([row, block * N])
            total = tl.dot(inputs.load([first, k]), right, total, input_precision=PRECISION)
            row += K
        if CONSTANT:
            column = block * N + tl.arange(0, N)
            constant = tl.load(constant_ptr + task.to(tl.int64) * columns + column, mask=column < columns, other=0.0)
            total += constant[None, :]
        result = total.to(out_ptr.dtype.element_ty)
        if GROUPED:
            if first + M > stop:
                last = tl.make_tensor_descriptor(
                    out_ptr, shape=[stop, columns], strides=[columns, 1], block_shape=[M, N]
                )
                last.store([first, block * N], result)
            else:
                out.store([first, block * N], result)
        else:
            out.store([first, block * N], result)


@triton.jit
def pack_neurons_kernel(
    source_ptr,
    bias_ptr,
    index_ptr,
    out_ptr,
    out_bias_ptr,
    index_width,
    width,
    features,
    out_features,
    neuron_stride,
    feature_stride,
    out_neuron_stride,
    out_feature_stride,
    BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    FILL: tl.constexpr,
    NEURONS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Packs neurons with their features, zero beyond them, and the bias, in float32.

    Where a task has no neuron: zero; with FILL the first neuron of the task again. IN_PLACE: its own bias.
    """
    task = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    neuron = tl.load(index_ptr + task * index_width + place, mask=place < index_width, other=-1)
    if FILL:
        first = tl.load(index_ptr + task * index_width, mask=index_width > 0, other=-1)
        neuron = tl.where(neuron < 0, first, neuron)
    has = neuron >= 0
    source = source_ptr + neuron[:, None] * neuron_stride + feature.to(tl.int64)[None, :] * feature_stride
    block = tl.load(source, mask=has[:, None] & (feature < features)[None, :], other=0.0)
    out = out_ptr + task * width * out_features
    out += place.to(tl.int64)[:, None] * out_neuron_stride + feature.to(tl.int64)[None, :] * out_feature_stride
    tl.store(out, block, mask=(place < width)[:, None] & (feature < out_features)[None, :])
    if BIAS:
        if IN_PLACE:
            bias = tl.load(bias_ptr + place, mask=place < index_width, other=0.0)
        else:
            bias = tl.load(bias_ptr + neuron, mask=has, other=0.0)
        here = (place < width) & (tl.program_id(1) == 0)
        tl.store(out_bias_ptr + task * width + place, bias.to(tl.float32), mask=here)
