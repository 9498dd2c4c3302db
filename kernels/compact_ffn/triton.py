"""Triton: packs the weights of every task's active neurons, computes on compact operands, and expands the gradients.

Packing costs one pass over the weights in each direction, whatever the number of tokens; in return every product reads
whole, aligned blocks. Products that end in something (ReLU; the gate and the sums for db1) are kernels of our own, as are
those of several tasks, in one launch each; ``common/products.py`` says which others the library computes. Every sum has a
fixed order, and every output is written once.

What tensor descriptors cannot read is copied: features that are no whole 16 bytes are padded with zeros, and so is an
in-place index of a d_ff that is no multiple of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import checks
from ..common.active import places_of
from ..common.products import by_library, launched
from ..common.triton_launch import (
    INTERPRETER,
    SMALL,
    Shipped,
    cdiv,
    launch,
    padded,
    pointer,
    precision,
    processors,
    rows16,
    target_of,
)
from ..common.triton_tasks import (
    DTYPES,
    TOKENS,
    Tasks,
    Tile,
    column_sums,
    compact_width,
    refuses,
    task_sums_kernel,
    task_sums_launch,
    tasks_of,
    tile_sums,
    whole,
)
from ..row_sparse_wgrad.triton import expand, precisions, product_parts
from .triton_kernels import (
    constant_kernel,
    expand_bias_kernel,
    from_neurons_kernel,
    pack_fc1_kernel,
    pack_fc2_kernel,
    to_neurons_kernel,
)

_PACK_ROWS = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
_PACK_COLUMNS = {"NEURONS": 64, "OUTPUTS": 64, "num_warps": 4}
_CONSTANT = {"BLOCKS": 64, "COLUMNS": 128, "num_warps": 8}
# Few programs, each a chain of loads: the more outputs a step has, the shorter (9.0: 95 registers, no spill, Triton 3.6).
_EXPAND_BIAS = {"NEURONS": 32, "OUTPUTS": 256, "TILES": 16, "num_warps": 8}


def _float32_tile(precise: str, warps: int) -> Tile:
    """Without tensor cores ("ieee") accumulator and operands share the registers: a spill decides the warps."""
    if precise == "tf32":
        return Tile(64, 64, 32, 8, 4, 2)
    return Tile(64, 64, 16, 8, warps, 2 if warps == 4 else 3)


def neurons_tile(target: str, dtype: torch.dtype, precise: str, gate: bool) -> Tile:
    """The block sizes of ``to_neurons_kernel``: neurons, tokens, depth."""
    if target == INTERPRETER:
        return Tile(64, 32, 32, 2, 4, 1)
    if dtype == torch.float32:
        # 4 warps spill for 8.6 without gate (Triton 3.6), 8 with it (Triton 3.7).
        return _float32_tile(precise, 8 if target == SMALL and not gate else 4)
    return {
        "cuda:80": Tile(128, 128, 64, 8, 8, 3),
        SMALL: Tile(128, 128, 32, 8, 8, 3),
        "cuda:90": Tile(128, 256, 64, 8, 8, 3),
        # With 8 warps the transposed store aborts the compiler on 10.0 (Triton 3.6 and 3.7).
        "cuda:100": Tile(128, 128, 64, 8, 4, 3),
        "hip:gfx942": Tile(128, 128, 64, 8, 8, 2),
    }[target]


def flattens(target: str, dtype: torch.dtype, grouped: bool, gate: bool) -> bool:
    """Whether the loop over the tiles of ``to_neurons_kernel`` is flattened with that over their steps.

    The gate's block of h does not fit beside three stages then, a task is found by a loop of its own, and flattening spills
    or takes twice the shared memory elsewhere, as in ``linear_relu_count``.
    """
    return not (grouped or gate) and (target == INTERPRETER or (target == "cuda:90" and dtype != torch.float32))


def features_tile(target: str, dtype: torch.dtype, precise: str) -> Tile:
    """The block sizes of ``from_neurons_kernel``: tokens, features, depth."""
    if target == INTERPRETER:
        return Tile(32, 32, 32, 2, 4, 1)
    if dtype == torch.float32:
        # 4 warps spill for 10.0 (Triton 3.6); with 8, the wider wavefronts of AMD would load less than 16 bytes a thread.
        return _float32_tile(precise, 4 if target.startswith("hip") else 8)
    return {
        "cuda:80": Tile(128, 128, 64, 8, 8, 3),
        SMALL: Tile(128, 128, 32, 8, 8, 3),
        "cuda:90": Tile(128, 256, 64, 8, 8, 3),
        "cuda:100": Tile(128, 256, 64, 8, 8, 3),
        "hip:gfx942": Tile(128, 128, 64, 8, 8, 2),
    }[target]


class Packed(NamedTuple):
    """The weights of all tasks, neuron-major: task t has the rows ``t * width`` to ``(t + 1) * width``.

    ``fc1 [tasks * width, d_in]``, ``bias [tasks * width]`` or None, ``fc2 [tasks * width, d_out]``, with features padded to
    16 bytes; rows without a neuron are zero. ``constant [tasks, d_out]`` or None, float32 for our kernels.
    """

    fc1: Tensor
    bias: Tensor | None
    fc2: Tensor
    constant: Tensor | None
    width: int


def pack(
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    index: Tensor,
    places: Tensor,
    dtype: torch.dtype,
    constant: torch.dtype | None,
) -> Packed:
    """Gathers in ``dtype`` what the tasks of ``index [tasks, width]`` need.

    With ``constant``, also ``b2 + W2[:, I] relu(b1[I])`` in that dtype, summed in float32.
    """
    tasks, index_width = index.shape
    (d_ff, d_in), d_out, width = w1.shape, w2.shape[0], compact_width(index)
    fc1 = w1.new_empty((tasks * width, padded(d_in, dtype)), dtype=dtype)
    fc2 = w1.new_empty((tasks * width, padded(d_out, dtype)), dtype=dtype)
    bias = None if b1 is None else w1.new_empty(tasks * width, dtype=dtype)
    columns = max(fc1.shape[1], fc2.shape[1])
    grid: tuple[int, ...] = (cdiv(width, _PACK_ROWS["ROWS"]), cdiv(columns, _PACK_ROWS["COLUMNS"]), tasks)
    sizes = (index_width, width, d_in, *w1.stride(), fc1.stride(0), fc2.stride(0))
    keywords = {"BIAS": b1 is not None, "IN_PLACE": index_width == d_ff, **_PACK_ROWS}
    launch(pack_fc1_kernel, grid, w1.device, w1, b1, index, fc1, bias, fc2, *sizes, **keywords)
    blocks, columns = cdiv(d_ff, _PACK_COLUMNS["NEURONS"]), fc2.shape[1]
    shares = None
    if constant and b1 is not None:
        shares = torch.empty((tasks, blocks, columns), dtype=torch.float32, device=w1.device)
    grid = (blocks, cdiv(columns, _PACK_COLUMNS["OUTPUTS"]))
    more = (tasks, width, d_ff, d_out, *w2.stride(), fc2.stride(0))
    keywords = {"CONSTANT": shares is not None, **_PACK_COLUMNS}
    launch(pack_fc2_kernel, grid, w1.device, w2, b1, places, fc2, shares, *more, **keywords)
    total = None
    if constant and not (b1 is None and b2 is None):
        total = torch.empty((tasks, columns), dtype=constant, device=w1.device)
        grid = (tasks, cdiv(columns, _CONSTANT["COLUMNS"]))
        keywords = {"PARTS": shares is not None, "BIAS": b2 is not None, **_CONSTANT}
        b2 = None if b2 is None else b2.contiguous()
        launch(constant_kernel, grid, w1.device, shares, b2, total, blocks, d_out, columns, **keywords)
    return Packed(fc1, bias, fc2, total, width)


def _parts(tasks: Tasks, task_offsets: Tensor | None, width: int) -> list[tuple[int, slice, slice]]:
    """For the library, each task with its tokens and with its rows of the packed weights."""
    bounds = [(0, tasks.tokens)] if tasks.number == 1 else checks.segments(task_offsets, tasks.tokens)
    return [(t, slice(*tokens), slice(t * width, (t + 1) * width)) for t, tokens in enumerate(bounds)]


def _multiply(a: Tensor, b: Tensor, constant: Tensor | None, out: Tensor) -> None:
    """Writes ``out = a b + constant`` by the library."""
    if constant is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(constant, a, b, out=out)


def _hidden(x: Tensor, packed: Packed, tasks: Tasks, task_offsets: Tensor | None) -> Tensor:
    """``h [tokens, width]``."""
    h = x.new_empty((tasks.tokens, packed.width))
    if not by_library("h", x.dtype, task_offsets):
        _to_neurons(x, packed.fc1, packed.bias, None, h, tasks)
        return h
    for _, tokens, rows in _parts(tasks, task_offsets, packed.width):
        bias = None if packed.bias is None else packed.bias[rows]
        _multiply(x[tokens], packed.fc1[rows].t(), bias, h[tokens])
    # Not _addmm_activation: nothing promises that the ReLU inside it lets NaN through.
    return h.relu_()


def _hidden_gradient(
    dy: Tensor, h: Tensor, fc2: Tensor, tasks: Tasks, task_offsets: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor | None, int]:
    """``dh [tokens, width]``; if wanted its sums over tiles of tokens, float32 ``[tiles, width]``; the size of a tile."""
    dh = torch.empty_like(h)
    if not by_library("dh", h.dtype, task_offsets):
        return dh, *_to_neurons(dy, fc2, None, h, dh, tasks)
    for _, tokens, rows in _parts(tasks, task_offsets, h.shape[1]):
        _multiply(dy[tokens], fc2[rows].t(), None, dh[tokens])
    torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
    if not sums or tasks.offsets is None:
        return dh, dh.sum(0, dtype=torch.float32)[None] if sums else None, tasks.tokens
    return dh, tile_sums(dh, tasks), TOKENS


def _to_neurons(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, out: Tensor, tasks: Tasks
) -> tuple[Tensor | None, int]:
    """Launches ``to_neurons_kernel``, with the gate where h is given; gives the sums and the tokens in a tile of them."""
    device, dtype, width, precise = out.device, out.dtype, out.shape[1], precision(out.dtype)
    tile = neurons_tile(target_of(device), dtype, precise, h is not None)
    tiles = tasks.most_tiles(tile.n)
    sums = None if h is None else torch.empty((tiles, width), dtype=torch.float32, device=device)
    programs = min(processors(device), tiles * cdiv(width, tile.m))
    pointers = (inputs, weight, bias, h, out, sums, tasks.offsets)
    sizes = (tasks.tokens, tasks.number, width, inputs.shape[1], inputs.stride(0), weight.stride(0))
    grouped, gate = tasks.offsets is not None, h is not None
    keywords = {"GROUPED": grouped, "BIAS": bias is not None, "GATE": gate, **tile.keywords(precise)}
    keywords["FLATTEN"] = flattens(target_of(device), dtype, grouped, gate)
    launch(to_neurons_kernel, (programs,), device, *pointers, *sizes, workspace=True, **keywords)
    return sums, tile.n


def _features(
    product: str,
    inputs: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    tasks: Tasks,
    task_offsets: Tensor | None,
    columns: int,
) -> Tensor:
    """``inputs weight + constant``, ``[tokens, columns]``; the key of the product in ``common/products.py``."""
    device, dtype, width = inputs.device, inputs.dtype, inputs.shape[1]
    out = inputs.new_empty((tasks.tokens, weight.shape[1]))
    if by_library(product, dtype, task_offsets):
        for task, tokens, rows in _parts(tasks, task_offsets, width):
            added = None if constant is None else constant[task]
            _multiply(inputs[tokens], weight[rows], added, out[tokens])
        return whole(out, columns)
    precise = precision(dtype)
    tile = features_tile(target_of(device), dtype, precise)
    # A step over the edge would multiply zeros by rows of the next task, whose NaN and infinities would give NaN.
    assert width % tile.k == 0, f"{width} packed columns are no multiple of a step of {tile.k}"
    programs = min(processors(device), tasks.most_tiles(tile.m) * cdiv(out.shape[1], tile.n))
    pointers = (inputs, weight, constant, out, tasks.offsets)
    sizes = (tasks.tokens, tasks.number, width, out.shape[1])
    keywords = {"GROUPED": tasks.offsets is not None, "CONSTANT": constant is not None}
    keywords |= tile.keywords(precise)
    launch(from_neurons_kernel, (programs,), device, *pointers, *sizes, workspace=True, **keywords)
    return whole(out, columns)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As the reference; the constant of the inactive neurons is summed in float32.

    Weights and biases may be float32 whatever the dtype of x. Keeps h, and the packed weights and the places.
    """
    (tokens, d_out), index_width = (x.shape[0], w2.shape[0]), index.shape[1]
    tasks = tasks_of(tokens, task_offsets, x.device)
    if tokens == 0:
        return x.new_empty((0, d_out)), (x.new_empty((0, index_width)),)
    index, b1 = index.contiguous(), None if b1 is None else b1.contiguous()
    if places is None:
        places = places_of(index, w1.shape[0])
    library = by_library("y", x.dtype, task_offsets)
    packed = pack(w1, b1, w2, b2, index, places, x.dtype, x.dtype if library else torch.float32)
    h = _hidden(rows16(x), packed, tasks, task_offsets)
    y = _features("y", h, packed.fc2, packed.constant, tasks, task_offsets, d_out)
    return y, (whole(h, index_width), packed.fc1, packed.fc2, places)


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    h: Tensor,
    *kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """As the reference; sums over tokens and over tasks are in float32. Packs again where nothing but h was kept."""
    (d_ff, d_in), d_out = w1.shape, w2.shape[0]
    tasks = tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        zeros = w1.new_zeros
        return x.new_zeros(x.shape), zeros(w1.shape), zeros(d_ff), zeros(w2.shape), zeros(d_out)
    b1 = None if b1 is None else b1.contiguous()
    if kept:
        fc1, fc2, places = kept
    else:
        index = index.contiguous()
        places = places_of(index, d_ff)
        fc1, _, fc2, _, _ = pack(w1, b1, w2, None, index, places, x.dtype, None)
    width = compact_width(index)
    dy, x, h = rows16(dy), rows16(x), _as_wide(h, width)
    s = whole(column_sums(dy, tasks), d_out)
    dh, active, size = _hidden_gradient(dy, h, fc2, tasks, task_offsets, sums=b1 is not None)
    dx = _features("dx", dh, fc1, None, tasks, task_offsets, d_in)
    dw1, dw2 = w1.new_empty(w1.shape), w2.new_empty(w2.shape)
    expand(*product_parts(dh, x, tasks, task_offsets), places, tasks, dw1)
    constant = None if b1 is None else (b1, s)
    expand(*product_parts(h, dy, tasks, task_offsets), places, tasks, dw2.t(), constant)
    db2 = (s[0] if tasks.number == 1 else s.sum(0)).to(w2.dtype)
    if b1 is None:
        return dx, dw1, None, dw2, db2
    one = tasks.number == 1
    db1 = b1.new_empty((tasks.number, d_ff), dtype=b1.dtype if one else torch.float32)
    pointers = (active, s, w2, b1, places, tasks.offsets, db1)
    sizes = (tasks.tokens, tasks.number, size, width, d_ff, d_out, *w2.stride())
    grid = (cdiv(d_ff, _EXPAND_BIAS["NEURONS"]), tasks.number)
    keywords = {"GROUPED": tasks.offsets is not None, **_EXPAND_BIAS}
    launch(expand_bias_kernel, grid, x.device, *pointers, *sizes, **keywords)
    return dx, dw1, db1[0] if one else db1.sum(0).to(b1.dtype), dw2, db2


def _as_wide(h: Tensor, width: int) -> Tensor:
    """The activations as the kernels wrote them, before their padding was cut off."""
    if h.shape[1] == width and h.is_contiguous() and h.data_ptr() % 16 == 0:
        return h
    wide = h.new_zeros((h.shape[0], width))
    wide[:, : h.shape[1]] = h
    return wide


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor, task_offsets: Tensor | None
) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    cast = (
        x.dtype in DTYPES and w1.dtype == torch.float32 and all(t is None or t.dtype == w1.dtype for t in (b1, w2, b2))
    )
    return refuses((x, w1, b1, w2, b2), index, x.shape[0], same=not cast)


def shipped(target: str) -> list[Shipped]:
    """Every kernel and configuration that can be launched on a target; ``row_sparse_wgrad`` lists those that it lends."""
    kernels = []
    for dtype in (torch.bfloat16, torch.float32):
        for given in dict.fromkeys((dtype, torch.float32)):
            kernels += _shipped_packing(given, dtype)
        for precise in precisions(target, dtype):
            kernels += _shipped_products(target, dtype, precise)
    for grouped in (False, True):
        signature = {"sums_ptr": "*fp32", "out_ptr": "*fp32", **dict.fromkeys(("tokens", "columns", "size"), "i32")}
        name = f"sums of tasks {_label(grouped)}"
        offsets = _offsets(grouped, signature)
        keywords = {**offsets, **task_sums_launch(grouped)}
        aligned = ("sums_ptr", "out_ptr", "columns")
        kernels.append(Shipped(name, task_sums_kernel, signature, keywords, aligned, covered=not grouped))
    return kernels


def _label(grouped: bool) -> str:
    return "tasks" if grouped else "one task"


def _offsets(grouped: bool, signature: dict[str, str]) -> dict[str, None]:
    """Puts the offsets into the signature where there are several tasks; gives the constants that there are else."""
    if not grouped:
        return {"offsets_ptr": None}
    signature["offsets_ptr"] = "*i64"
    return {}


def _shipped_packing(given: torch.dtype, dtype: torch.dtype) -> list[Shipped]:
    """The kernels that read weights in dtype ``given``, for products in ``dtype``."""
    w, p = pointer(given), pointer(dtype)
    name = str(dtype).removeprefix("torch.") + ("" if given == dtype else " of float32")
    kernels = []

    def add(
        label: str, kernel: Any, pointers: dict[str, str], sizes: Sequence[str], keywords: dict, covered: bool = False
    ) -> None:
        signature = {**pointers, **dict.fromkeys(sizes, "i32")}
        aligned = tuple(argument for argument in signature if argument not in ("tokens", "tasks", "size", "blocks"))
        kernels.append(Shipped(f"{label} {name}", kernel, signature, keywords, aligned, covered=covered))

    pointers = {"w1_ptr": w, "b1_ptr": w, "index_ptr": "*i64", **dict.fromkeys(("fc1_ptr", "bias_ptr", "fc2_ptr"), p)}
    sizes: Sequence[str] = ("index_width", "width", "d_in", "w1_stride", "fc1_stride", "fc2_stride")
    for in_place in (False, True):
        keywords = {"BIAS": True, "IN_PLACE": in_place, "w1_column_stride": 1, **_PACK_ROWS}
        label = f"pack fc1 {'in place' if in_place else 'compact'}"
        add(label, pack_fc1_kernel, pointers, sizes, keywords, covered=in_place or dtype == torch.float32)
    reads = {"w2_ptr": w, "b1_ptr": w, "places_ptr": "*i32"}
    sizes = ("tasks", "width", "d_ff", "d_out", "w2_stride", "fc2_stride")
    packing = {"w2_column_stride": 1, **_PACK_COLUMNS}
    pointers = {**reads, "fc2_ptr": p}
    add("pack fc2", pack_fc2_kernel, pointers, sizes, {**packing, "CONSTANT": False, "parts_ptr": None}, covered=True)
    pointers["parts_ptr"] = "*fp32"
    add("pack fc2 and constant", pack_fc2_kernel, pointers, sizes, {**packing, "CONSTANT": True})
    pointers = {"parts_ptr": "*fp32", "b2_ptr": w, "out_ptr": p}
    add(
        "constant",
        constant_kernel,
        pointers,
        ("blocks", "d_out", "columns"),
        {"PARTS": True, "BIAS": True, **_CONSTANT},
    )
    sizes = ("tokens", "tasks", "size", "width", "d_ff", "d_out", "w2_stride")
    for grouped in (False, True):
        pointers = {**reads, "active_ptr": "*fp32", "sums_ptr": "*fp32", "out_ptr": "*fp32" if grouped else w}
        keywords = {"GROUPED": grouped, **_offsets(grouped, pointers), "w2_column_stride": 1, **_EXPAND_BIAS}
        add(f"expand bias {_label(grouped)}", expand_bias_kernel, pointers, sizes, keywords, covered=not grouped)
    return kernels


def _shipped_products(target: str, dtype: torch.dtype, precise: str) -> list[Shipped]:
    p, name = pointer(dtype), f"{str(dtype).removeprefix('torch.')} {precise}"
    expect = ("product32",) if dtype == torch.float32 else ("product16",)
    kernels = []
    for grouped in (False, True):
        for gate in (False, True):
            if not launched("dh" if gate else "h", dtype, grouped, target):
                continue
            tile = neurons_tile(target, dtype, precise, gate)
            sizes = ("width", "depth", "in_stride", "weight_stride")
            signature = {**dict.fromkeys(("in_ptr", "weight_ptr", "out_ptr"), p), **dict.fromkeys(sizes, "i32")}
            signature |= {"h_ptr": p, "sums_ptr": "*fp32"} if gate else {"bias_ptr": p}
            aligned = tuple(signature)
            signature |= {"tokens": "i32", "tasks": "i32"}
            keywords = {"GROUPED": grouped, "GATE": gate, "BIAS": not gate, **tile.keywords(precise)}
            keywords |= {"bias_ptr": None} if gate else {"h_ptr": None, "sums_ptr": None}
            keywords |= {"FLATTEN": flattens(target, dtype, grouped, gate), **_offsets(grouped, signature)}
            label = f"{'gated' if gate else 'relu'} {name} {_label(grouped)} {tile.m}x{tile.n}"
            kernels.append(Shipped(label, to_neurons_kernel, signature, keywords, aligned, expect))
        for constant in (False, True):
            if not launched("y" if constant else "dx", dtype, grouped, target):
                continue
            tile = features_tile(target, dtype, precise)
            signature = {**dict.fromkeys(("in_ptr", "weight_ptr", "out_ptr"), p), "width": "i32", "columns": "i32"}
            if constant:
                signature["constant_ptr"] = "*fp32"
            aligned = tuple(signature)
            signature |= {"tokens": "i32", "tasks": "i32"}
            keywords = {"GROUPED": grouped, "CONSTANT": constant, **tile.keywords(precise)}
            keywords |= {**({} if constant else {"constant_ptr": None}), **_offsets(grouped, signature)}
            label = f"features {name} {_label(grouped)}{' constant' if constant else ''} {tile.m}x{tile.n}"
            kernels.append(Shipped(label, from_neurons_kernel, signature, keywords, aligned, expect, not constant))
    return kernels
