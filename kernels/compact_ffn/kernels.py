"""The Triton kernels of ``compact_ffn``; ``triton.py`` launches them and says in which order.

Packed weights are neuron-major, ``[tasks * width, d_in]`` and ``[tasks * width, d_out]``: one neuron is one row of both,
and the rows of a task begin at ``task * width``. ``width`` is a multiple of 64, and rows without a neuron are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.kernels import task_end, tile_order, tiles_before, token_tile


@triton.jit
def pack_fc1_kernel(
    w1_ptr,
    b1_ptr,
    index_ptr,
    fc1_ptr,
    bias_ptr,
    fc2_ptr,
    index_width,
    width,
    d_in,
    w1_stride,
    w1_column_stride,
    fc1_stride,
    fc2_stride,
    BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Packs rows of W1 and b1; where there is no neuron, writes zeros, into the packed W2 too.

    IN_PLACE: a neuron that is not active keeps its bias, so that its activation is relu(b1), as in the reference.
    """
    task = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = place < width
    neuron = tl.load(index_ptr + task * index_width + place, mask=place < index_width, other=-1)
    has = neuron >= 0
    row = task * width + place
    source = w1_ptr + neuron[:, None] * w1_stride + column.to(tl.int64)[None, :] * w1_column_stride
    w1 = tl.load(source, mask=has[:, None] & (column < d_in)[None, :], other=0.0)
    inside = there[:, None] & (column < fc1_stride)[None, :]
    tl.store(fc1_ptr + row[:, None] * fc1_stride + column[None, :], w1, mask=inside)
    empty = (there & (neuron < 0))[:, None] & (column < fc2_stride)[None, :]
    nothing = tl.zeros((ROWS, COLUMNS), fc2_ptr.dtype.element_ty)
    tl.store(fc2_ptr + row[:, None] * fc2_stride + column[None, :], nothing, mask=empty)
    if BIAS:
        first = there & (tl.program_id(1) == 0)
        if IN_PLACE:
            b1 = tl.load(b1_ptr + place, mask=first & (place < index_width), other=0.0)
        else:
            b1 = tl.load(b1_ptr + neuron, mask=first & has, other=0.0)
        tl.store(bias_ptr + row, b1, mask=first)


@triton.jit(do_not_specialize=["tasks"])
def pack_fc2_kernel(
    w2_ptr,
    b1_ptr,
    places_ptr,
    fc2_ptr,
    parts_ptr,
    tasks,
    width,
    d_ff,
    d_out,
    w2_stride,
    w2_column_stride,
    fc2_stride,
    CONSTANT: tl.constexpr,
    NEURONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Packs a block of neurons of W2 ``[d_out, d_ff]`` for every task: read once along d_ff, written along d_out.

    CONSTANT: also the block's share of ``W2[:, I] relu(b1[I])``, float32 ``[tasks, blocks of neurons, d_out]``.
    """
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    real = neuron < d_ff
    source = w2_ptr + output.to(tl.int64)[:, None] * w2_stride + neuron.to(tl.int64)[None, :] * w2_column_stride
    w2 = tl.trans(tl.load(source, mask=(output < d_out)[:, None] & real[None, :], other=0.0))
    inside = output < fc2_stride
    if CONSTANT:
        b1 = tl.load(b1_ptr + neuron, mask=real, other=0.0).to(tl.float32)
        product = tl.maximum(b1, 0.0, propagate_nan=tl.PropagateNan.ALL)[:, None] * w2.to(tl.float32)
    for task in range(tasks):
        place = tl.load(places_ptr + tl.cast(task, tl.int64) * d_ff + neuron, mask=real, other=-1)
        row = tl.cast(task, tl.int64) * width + place
        tl.store(
            fc2_ptr + row[:, None] * fc2_stride + output[None, :], w2, mask=(place >= 0)[:, None] & inside[None, :]
        )
        if CONSTANT:
            part = (tl.cast(task, tl.int64) * tl.num_programs(0) + tl.program_id(0)) * fc2_stride
            total = tl.sum(tl.where((place < 0)[:, None], product, 0.0), axis=0)
            tl.store(parts_ptr + part + output, total, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def constant_kernel(
    parts_ptr,
    b2_ptr,
    out_ptr,
    blocks,
    d_out,
    columns,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``b2 + W2[:, I] relu(b1[I])`` of a task from its parts ``[tasks, blocks, columns]``, added up in their order."""
    task = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    if PARTS:
        sums = tl.zeros((BLOCKS, COLUMNS), tl.float32)
        for begin in range(0, blocks, BLOCKS):
            block = begin + tl.arange(0, BLOCKS)
            part = parts_ptr + (task * blocks + block)[:, None] * columns + column[None, :]
            sums += tl.load(part, mask=(block < blocks)[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.sum(sums, axis=0)
    if BIAS:
        total += tl.load(b2_ptr + column, mask=column < d_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + task * columns + column, total.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["tokens", "tasks"])
def to_neurons_kernel(
    in_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    out_ptr,
    sums_ptr,
    offsets_ptr,
    tokens,
    tasks,
    width,
    depth,
    in_stride,
    weight_stride,
    GROUPED: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    FLATTEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out [tokens, width] = relu(in weightᵀ + bias)``, or with GATE ``(in weightᵀ) ⊙ [h > 0]`` and its sums over tokens.

    Neurons are the rows of a block, so that the sum over its tokens stays within a warp. The sums are float32
    ``[tiles of N tokens, width]``, taken before rounding.
    """
    weight = tl.make_tensor_descriptor(
        weight_ptr, shape=[tasks * width, depth], strides=[weight_stride, 1], block_shape=[M, K]
    )
    inputs = tl.make_tensor_descriptor(in_ptr, shape=[tokens, depth], strides=[in_stride, 1], block_shape=[N, K])
    out = tl.make_tensor_descriptor(out_ptr, shape=[tokens, width], strides=[width, 1], block_shape=[N, M])
    if GATE:
        gate = tl.make_tensor_descriptor(h_ptr, shape=[tokens, width], strides=[width, 1], block_shape=[N, M])
    if GROUPED:
        tiles, _ = tiles_before(offsets_ptr, tasks, N, tokens, GROUPED)
    else:
        tiles = tl.cdiv(tokens, N)
    across = tl.cdiv(width, M)
    programs = tl.num_programs(0)
    steps = tl.cdiv(depth, K)
    # Flattened, the loop is one over all steps of all tiles: what follows the product runs while the next tile's operands
    # are on their way, and needs the number of its own tile.
    done = tl.program_id(0) - programs
    for item in tl.range(tl.program_id(0), tiles * across, programs, flatten=FLATTEN):
        tile, block = tile_order(item, tiles, across, GROUP)
        task, first, stop = token_tile(offsets_ptr, tile, N, tokens, tasks, GROUPED)
        total = tl.zeros((M, N), tl.float32)
        # What is read beyond the task, in tokens or in neurons, has rows and columns of its own, which nobody stores.
        for k in range(steps):
            left = weight.load([task * width + block * M, k * K])
            total = tl.dot(left, inputs.load([first, k * K]).T, total, input_precision=PRECISION)
        if FLATTEN:
            done += programs
            tile, block = tile_order(done, tiles, across, GROUP)
            task, first, stop = token_tile(offsets_ptr, tile, N, tokens, tasks, GROUPED)
        neuron = block * M + tl.arange(0, M)
        if GATE:
            # Not "h > 0": where h is NaN, PyTorch passes the gradient on.
            h = gate.load([first, block * M]).T.to(tl.float32)
            shut = (h <= 0) | (first + tl.arange(0, N) >= stop)[None, :]
            total = tl.where(shut, 0.0, total)
            sums = sums_ptr + tile.to(tl.int64) * width + neuron
            tl.store(sums, tl.sum(total, axis=1), mask=neuron < width)
        else:
            if BIAS:
                bias = tl.load(bias_ptr + task.to(tl.int64) * width + neuron, mask=neuron < width, other=0.0)
                total += bias.to(tl.float32)[:, None]
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        result = tl.trans(total.to(out_ptr.dtype.element_ty))
        if GROUPED:
            if first + N > stop:
                # The next task's tokens follow: a descriptor that ends with this task does not touch them.
                last = tl.make_tensor_descriptor(out_ptr, shape=[stop, width], strides=[width, 1], block_shape=[N, M])
                last.store([first, block * M], result)
            else:
                out.store([first, block * M], result)
        else:
            out.store([first, block * M], result)


@triton.jit(do_not_specialize=["tokens", "tasks", "size"])
def expand_bias_kernel(
    active_ptr,
    sums_ptr,
    w2_ptr,
    b1_ptr,
    places_ptr,
    offsets_ptr,
    out_ptr,
    tokens,
    tasks,
    size,
    width,
    d_ff,
    d_out,
    w2_stride,
    w2_column_stride,
    GROUPED: tl.constexpr,
    NEURONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """A task's share of db1: sums of dh over its tokens where it has the neuron, else ``(s W2[:, neuron]) [b1 > 0]``.

    ``active`` are the sums of dh over tiles of ``size`` tokens, float32 ``[tiles, width]``; s is ``sums[task]``.
    """
    task = tl.program_id(1)
    task64 = task.to(tl.int64)
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    real = neuron < d_ff
    place = tl.load(places_ptr + task64 * d_ff + neuron, mask=real, other=-1)
    first, start = tiles_before(offsets_ptr, task, size, tokens, GROUPED)
    last = first + tl.cdiv(task_end(offsets_ptr, task, start, tokens, GROUPED) - start, size)
    parts = tl.zeros((TILES, NEURONS), tl.float32)
    for begin in range(first, last, TILES):
        tile = begin + tl.arange(0, TILES)
        source = active_ptr + tile.to(tl.int64)[:, None] * width + place[None, :]
        parts += tl.load(source, mask=(tile < last)[:, None] & (place >= 0)[None, :], other=0.0)
    through = tl.zeros((OUTPUTS, NEURONS), tl.float32)
    for begin in range(0, d_out, OUTPUTS):
        output = begin + tl.arange(0, OUTPUTS)
        s = tl.load(sums_ptr + task64 * d_out + output, mask=output < d_out, other=0.0)
        source = output.to(tl.int64)[:, None] * w2_stride + neuron.to(tl.int64)[None, :] * w2_column_stride
        w2 = tl.load(w2_ptr + source, mask=(output < d_out)[:, None] & real[None, :], other=0.0)
        through += s[:, None] * w2.to(tl.float32)
    positive = tl.load(b1_ptr + neuron, mask=real, other=0.0).to(tl.float32) > 0
    constant = tl.where((place < 0) & positive, tl.sum(through, axis=0), 0.0)
    total = tl.sum(parts, axis=0) + constant
    tl.store(out_ptr + task64 * d_ff + neuron, total.to(out_ptr.dtype.element_ty), mask=real)
