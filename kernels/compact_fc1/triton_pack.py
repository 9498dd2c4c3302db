"""Triton: weights of every task's active neurons, packed, and the products with them; ``compact_fc2`` uses them too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.products import by_library
from ..common.triton_launch import Shipped, launch, padded, pointer, precision, processors, target_of
from ..common.triton_tasks import WIDTH_MULTIPLE, Tasks, compact_width
from ..compact_ffn.triton import features_tile
from ..compact_ffn.triton_kernels import from_neurons_kernel

_PACK = {"NEURONS": 64, "FEATURES": 64, "num_warps": 4}


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
        first = tl.load(index_ptr + task * index_width)
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


def pack_neurons(
    source: Tensor, bias: Tensor | None, index: Tensor, rows: bool, fill: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The weights of the neurons of every task.

    Args:
        source: ``[d_ff, features]``, of any strides.
        bias: ``[d_ff]``, contiguous, or None.
        index: int64 ``[tasks, index width]``, contiguous.
        rows: whether a neuron is a row of the result, or a column.
        fill: whether the padding of the compact layout repeats the task's first neuron.

    Returns:
        ``[tasks * width, padded features]``, each row of whole 16 bytes, or ``[tasks * deep features, width]`` with whole
        steps of a product, and the bias, float32 ``[tasks, width]``; ``width`` is that of ``compact_width``.
    """
    (tasks, index_width), (d_ff, features) = index.shape, source.shape
    width = compact_width(index)
    out_features = padded(features, source.dtype) if rows else deep(features)
    out = source.new_empty((tasks * width, out_features) if rows else (tasks * out_features, width))
    packed_bias = None
    if bias is not None:
        packed_bias = torch.empty((tasks, width), dtype=torch.float32, device=source.device)
    in_place = index_width == d_ff
    strides = (*source.stride(), *(out.stride() if rows else out.stride()[::-1]))
    sizes = (index_width, width, features, out_features, *strides)
    keywords = {"BIAS": bias is not None, "IN_PLACE": in_place, "FILL": fill and not in_place and index_width > 0}
    grid = (triton.cdiv(width, _PACK["NEURONS"]), triton.cdiv(out_features, _PACK["FEATURES"]), tasks)
    pointers = (source, bias, index, out, packed_bias)
    launch(pack_neurons_kernel, grid, source.device, *pointers, *sizes, **keywords, **_PACK)
    return out, packed_bias


def deep(features: int) -> int:
    """``features``, rounded up to whole steps of a product over them."""
    return triton.cdiv(features, WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def wide(matrix: Tensor, columns: int) -> Tensor:
    """``matrix [rows, <= columns]`` as the products read it: contiguous rows of ``columns``, zero behind what it has."""
    if matrix.shape[1] == columns and matrix.is_contiguous() and matrix.data_ptr() % 16 == 0:
        return matrix
    copy = matrix.new_zeros((matrix.shape[0], columns))
    copy[:, : matrix.shape[1]] = matrix
    return copy


def multiply(
    product: str,
    inputs: Tensor,
    source: Tensor,
    bias: Tensor | None,
    index: Tensor,
    tasks: Tasks,
    task_offsets: Tensor | None,
    to_neurons: bool,
    constant: Tensor | None = None,
) -> Tensor:
    """The product of each task's tokens with the weights of its neurons.

    Args:
        product: its key in ``common/products.py``.
        inputs: ``[tokens, features]``, or ``[tokens, width]`` in the layout of the index.
        source: ``[d_ff, features]``, of any strides.
        bias: of the neurons, ``[d_ff]``, contiguous, or None; with ``to_neurons``.
        index: int64 ``[tasks, index width]``, contiguous.
        tasks: at least one token.
        task_offsets: as the operator got them.
        to_neurons: ``inputs sourceᵀ + bias``, with padding that repeats a neuron where there is a product of the forward
            pass; else ``inputs source + constant``.
        constant: float32 ``[tasks, features]`` or None; without ``to_neurons``.

    Returns:
        ``[tokens, width]`` or ``[tokens, padded features]``.
    """
    width, device, dtype = compact_width(index), inputs.device, inputs.dtype
    library = by_library(product, dtype, task_offsets)
    rows = library or not to_neurons
    weight, packed_bias = pack_neurons(source, bias, index, rows, fill=to_neurons and product == "y")
    columns = width if to_neurons else weight.shape[1]
    added = packed_bias if to_neurons else constant
    if added is not None and added.shape[1] < columns:
        added = torch.nn.functional.pad(added, (0, columns - added.shape[1]))
    depth = (weight.shape[1] if library else deep(source.shape[1])) if to_neurons else width
    inputs = wide(inputs, depth)
    out = inputs.new_empty((tasks.tokens, columns))
    if library:
        bounds = [(0, tasks.tokens)] if tasks.number == 1 else checks.segments(task_offsets, tasks.tokens)
        for task, (start, stop) in enumerate(bounds):
            own = weight[task * width : (task + 1) * width]
            own = own.t() if to_neurons else own
            if added is None:
                torch.mm(inputs[start:stop], own, out=out[start:stop])
            else:
                torch.addmm(added[task].to(dtype), inputs[start:stop], own, out=out[start:stop])
        return out
    precise = precision(dtype)
    tile = features_tile(target_of(device), dtype, precise)
    # A step over the edge would multiply zeros by rows of the next task, whose NaN and infinities would give NaN.
    assert depth % tile.k == 0, f"{depth} packed columns are no multiple of a step of {tile.k}"
    programs = min(processors(device), tasks.most_tiles(tile.m) * triton.cdiv(columns, tile.n))
    pointers = (inputs, weight, added, out, tasks.offsets)
    sizes = (tasks.tokens, tasks.number, depth, columns)
    keywords = {"GROUPED": tasks.offsets is not None, "CONSTANT": added is not None}
    launch(from_neurons_kernel, (programs,), device, *pointers, *sizes, **keywords, **tile.keywords(precise))
    return out


def shipped_packing(dtype: torch.dtype, columns_of_source: bool) -> list[Shipped]:
    """The configurations of the packing kernel for fc1's rows or fc2's columns; the product is ``compact_ffn``'s."""
    p, name = pointer(dtype), str(dtype).removeprefix("torch.")
    kernels = []
    for rows in (True, False):
        pointers = {"source_ptr": p, "index_ptr": "*i64", "out_ptr": p}
        strides = ["neuron_stride", "feature_stride", "out_neuron_stride", "out_feature_stride"]
        ones = {strides.pop(0 if columns_of_source else 1): 1, strides.pop(-1 if rows else -2): 1}
        sizes = dict.fromkeys(("index_width", "width", "features", "out_features", *strides), "i32")
        for biased, in_place in (
            ((False, False),) if columns_of_source else ((False, False), (True, False), (True, True))
        ):
            fill = biased and not in_place
            none = {} if biased else {"bias_ptr": None, "out_bias_ptr": None}
            more = {"bias_ptr": p, "out_bias_ptr": "*fp32"} if biased else {}
            signature = {**pointers, **more, **sizes}
            keywords = {"BIAS": biased, "IN_PLACE": in_place, "FILL": fill, **none, **ones, **_PACK}
            kind = " with bias in place" if in_place else " with bias" if biased else ""
            label = f"pack {'rows' if rows else 'columns'}{kind} {name}"
            kernels.append(Shipped(label, pack_neurons_kernel, signature, keywords, tuple(signature), covered=not fill))
    return kernels
