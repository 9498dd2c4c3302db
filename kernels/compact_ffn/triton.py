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
from ..common.products import by_library, launched, ways
from ..common.triton_launch import (
    INTERPRETER,
    SMALL,
    Launcher,
    Shipped,
    aligned,
    cdiv,
    launching,
    padded,
    planned,
    pointer,
    precision,
    processors,
    rows16,
    target_of,
)
from ..common.triton_tasks import (
    DTYPES,
    Sums,
    Tasks,
    Tile,
    compact_width,
    refuses,
    task_sums_kernel,
    task_sums_launch,
    tasks_of,
    whole,
)
from ..row_sparse_wgrad.triton import Expand, Product, precisions
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


def _multiply(a: Tensor, b: Tensor, constant: Tensor | None, out: Tensor) -> None:
    """Writes ``out = a b + constant`` by the library."""
    if constant is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(constant, a, b, out=out)


def _parts(tasks: Tasks, task_offsets: Tensor | None, width: int) -> list[tuple[int, slice, slice]]:
    """For the library, each task of several with its tokens and with its rows of the packed weights."""
    bounds = checks.segments(task_offsets, tasks.tokens)
    return [(t, slice(*tokens), slice(t * width, (t + 1) * width)) for t, tokens in enumerate(bounds)]


class _Pack:
    """Gathers what the tasks need; for a plan."""

    def __init__(self, d_ff: int, width: int, dtype: torch.dtype, biases: tuple[bool, bool], constant: bool) -> None:
        has_b1, has_b2 = biases
        self.dtype, self.has_b1 = dtype, has_b1
        self.shares, self.constant = constant and has_b1, constant and (has_b1 or has_b2)
        self.fc1 = Launcher(pack_fc1_kernel, {"BIAS": has_b1, "IN_PLACE": width == d_ff, **_PACK_ROWS})
        self.fc2 = Launcher(pack_fc2_kernel, {"CONSTANT": self.shares, **_PACK_COLUMNS})
        keywords = {"PARTS": self.shares, "BIAS": has_b2, **_CONSTANT}
        self.total = Launcher(constant_kernel, keywords) if self.constant else None

    def __call__(
        self,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        index: Tensor,
        places: Tensor,
        constant: torch.dtype,
    ) -> Packed:
        """The packed weights; the constant ``b2 + W2[:, I] relu(b1[I])`` in the dtype given, summed in float32."""
        tasks, index_width = index.shape
        (d_ff, d_in), (d_out, _), width, dtype = w1.shape, w2.shape, compact_width(index), self.dtype
        rows, wide = padded(d_in, dtype), padded(d_out, dtype)
        fc1 = w1.new_empty((tasks * width, rows), dtype=dtype)
        fc2 = w1.new_empty((tasks * width, wide), dtype=dtype)
        bias = w1.new_empty(tasks * width, dtype=dtype) if self.has_b1 else None
        grid = (cdiv(width, _PACK_ROWS["ROWS"]), cdiv(max(rows, wide), _PACK_ROWS["COLUMNS"]), tasks)
        self.fc1(grid, w1, b1, index, fc1, bias, fc2, index_width, width, d_in, *w1.stride(), rows, wide)
        blocks, total = cdiv(d_ff, _PACK_COLUMNS["NEURONS"]), None
        shares = w1.new_empty((tasks, blocks, wide), dtype=torch.float32) if self.shares else None
        grid = (blocks, cdiv(wide, _PACK_COLUMNS["OUTPUTS"]), 1)
        self.fc2(grid, w2, b1, places, fc2, shares, tasks, width, d_ff, d_out, *w2.stride(), wide)
        if self.total is not None:
            total = w1.new_empty((tasks, wide), dtype=constant)
            self.total((tasks, cdiv(wide, _CONSTANT["COLUMNS"]), 1), shares, b2, total, blocks, d_out, wide)
        return Packed(fc1, bias, fc2, total, width)


class _Neurons:
    """Products into the neurons, with ReLU or with the gate; for a plan."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, bias: bool, gate: bool) -> None:
        precise, target = precision(dtype), target_of(device)
        self.tile, self.programs, self.gate = neurons_tile(target, dtype, precise, gate), processors(device), gate
        keywords = {"GROUPED": grouped, "BIAS": bias, "GATE": gate, "FLATTEN": flattens(target, dtype, grouped, gate)}
        self.launcher = Launcher(to_neurons_kernel, {**keywords, **self.tile.keywords(precise)})

    def __call__(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, out: Tensor, tasks: Tasks
    ) -> Tensor | None:
        """Writes out; with the gate gives the sums over tiles of tokens, float32 ``[tiles, width]``."""
        width = out.shape[1]
        tiles = tasks.most_tiles(self.tile.n)
        sums = out.new_empty((tiles, width), dtype=torch.float32) if self.gate else None
        programs = min(self.programs, tiles * cdiv(width, self.tile.m))
        pointers = (inputs, weight, bias, h, out, sums, tasks.offsets)
        sizes = (tasks.tokens, tasks.number, width, inputs.shape[1], inputs.stride(0), weight.stride(0))
        self.launcher((programs, 1, 1), *pointers, *sizes)
        return sums


class _Features:
    """Products from the neurons into features; for a plan. ``product`` is the key in ``common/products.py``."""

    def __init__(self, product: str, device: torch.device, dtype: torch.dtype, grouped: bool, constant: bool) -> None:
        precise, target = precision(dtype), target_of(device)
        self.product, self.tile, self.programs = product, features_tile(target, dtype, precise), processors(device)
        keywords = {"GROUPED": grouped, "CONSTANT": constant, **self.tile.keywords(precise)}
        self.launcher = Launcher(from_neurons_kernel, keywords)

    def __call__(
        self,
        inputs: Tensor,
        weight: Tensor,
        constant: Tensor | None,
        tasks: Tasks,
        task_offsets: Tensor | None,
        columns: int,
    ) -> Tensor:
        """``inputs weight + constant``, ``[tokens, columns]``."""
        width, wide = inputs.shape[1], weight.shape[1]
        out = inputs.new_empty((tasks.tokens, wide))
        if by_library(self.product, inputs.dtype, task_offsets):
            if tasks.number == 1:
                _multiply(inputs, weight, None if constant is None else constant[0], out)
                return whole(out, columns)
            for task, tokens, rows in _parts(tasks, task_offsets, width):
                _multiply(inputs[tokens], weight[rows], None if constant is None else constant[task], out[tokens])
            return whole(out, columns)
        # A step over the edge would multiply zeros by rows of the next task, whose NaN and infinities would give NaN.
        assert width % self.tile.k == 0, f"{width} packed columns are no multiple of a step of {self.tile.k}"
        programs = min(self.programs, tasks.most_tiles(self.tile.m) * cdiv(wide, self.tile.n))
        sizes = (tasks.tokens, tasks.number, width, wide)
        self.launcher((programs, 1, 1), inputs, weight, constant, out, tasks.offsets, *sizes)
        return whole(out, columns)


class _Forward:
    """The launches of forward passes that are alike in all that Triton compiles for."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, grouped: bool, biases: tuple[bool, bool], d_ff: int, width: int
    ) -> None:
        self.pack = _Pack(d_ff, width, dtype, biases, constant=True)
        self.hidden = _Neurons(device, dtype, grouped, biases[0], gate=False)
        self.features = _Features("y", device, dtype, grouped, any(biases))

    def __call__(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        index: Tensor,
        places: Tensor,
        tasks: Tasks,
        task_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor, Packed]:
        library = by_library("y", x.dtype, task_offsets)
        packed = self.pack(*weights, index, places, x.dtype if library else torch.float32)
        h = x.new_empty((tasks.tokens, packed.width))
        if not by_library("h", x.dtype, task_offsets):
            self.hidden(x, packed.fc1, packed.bias, None, h, tasks)
        elif tasks.number == 1:
            _multiply(x, packed.fc1.t(), packed.bias, h)
            h.relu_()  # not _addmm_activation: nothing promises that the ReLU inside it lets NaN through
        else:
            for _, tokens, rows in _parts(tasks, task_offsets, packed.width):
                bias = None if packed.bias is None else packed.bias[rows]
                _multiply(x[tokens], packed.fc1[rows].t(), bias, h[tokens])
            h.relu_()
        y = self.features(h, packed.fc2, packed.constant, tasks, task_offsets, weights[2].shape[0])
        return y, h, packed


class _Backward:
    """The launches of backward passes that are alike in all that Triton compiles for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, has_b1: bool) -> None:
        self.sums = Sums(grouped)
        self.hidden = _Neurons(device, dtype, grouped, bias=False, gate=True)
        self.features = _Features("dx", device, dtype, grouped, constant=False)
        self.product = Product(device, dtype, grouped)
        self.fc1, self.fc2 = Expand(grouped), Expand(grouped, constant=has_b1)
        self.bias = Launcher(expand_bias_kernel, {"GROUPED": grouped, **_EXPAND_BIAS})

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        weights: tuple[Tensor, Tensor | None, Tensor],
        kept: tuple[Tensor, ...],
        tasks: Tasks,
        task_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        w1, b1, w2 = weights
        h, fc1, fc2, places = kept
        (d_ff, d_in), d_out, one, width = w1.shape, w2.shape[0], tasks.number == 1, h.shape[1]
        s = whole(self.sums(dy, tasks), d_out)
        dh, active, size = self._hidden(dy, h, fc2, tasks, task_offsets, b1 is not None)
        dx = self.features(dh, fc1, None, tasks, task_offsets, d_in)
        dw1, dw2 = w1.new_empty(w1.shape), w2.new_empty(w2.shape)
        self.fc1(*self.product(dh, x, tasks, task_offsets), places, tasks, dw1)
        parts, chunk = self.product(h, dy, tasks, task_offsets)
        self.fc2(parts, chunk, places, tasks, dw2.t(), None if b1 is None else (b1, s))
        db2 = (s[0] if one else s.sum(0)).to(w2.dtype)
        if b1 is None:
            return dx, dw1, None, dw2, db2
        db1 = b1.new_empty((tasks.number, d_ff), dtype=b1.dtype if one else torch.float32)
        sizes = (tasks.tokens, tasks.number, size, width, d_ff, d_out, *w2.stride())
        grid = (cdiv(d_ff, _EXPAND_BIAS["NEURONS"]), tasks.number, 1)
        self.bias(grid, active, s, w2, b1, places, tasks.offsets, db1, *sizes)
        return dx, dw1, db1[0] if one else db1.sum(0).to(b1.dtype), dw2, db2

    def _hidden(
        self, dy: Tensor, h: Tensor, fc2: Tensor, tasks: Tasks, task_offsets: Tensor | None, sums: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """``dh [tokens, width]``; if wanted its sums over tiles, float32 ``[tiles, width]``; the tokens in a tile."""
        dh = torch.empty_like(h)
        if not by_library("dh", h.dtype, task_offsets):
            return dh, self.hidden(dy, fc2, None, h, dh, tasks), self.hidden.tile.n
        if tasks.number == 1:
            _multiply(dy, fc2.t(), None, dh)
        else:
            for _, tokens, rows in _parts(tasks, task_offsets, h.shape[1]):
                _multiply(dy[tokens], fc2[rows].t(), None, dh[tokens])
        torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        if tasks.number == 1 or not sums:
            return dh, dh.sum(0, dtype=torch.float32)[None] if sums else None, max(tasks.tokens, 1)
        return dh, self.sums.tiles(dh, tasks), self.sums.tiles.tokens


@planned
def _forward_plan(
    device: torch.device,
    dtype: torch.dtype,
    grouped: bool,
    biases: tuple[bool, bool],
    d_ff: int,
    width: int,
    *alike: Any,
) -> _Forward:
    return _Forward(device, dtype, grouped, biases, d_ff, width)


@planned
def _backward_plan(device: torch.device, dtype: torch.dtype, grouped: bool, has_b1: bool, *alike: Any) -> _Backward:
    return _Backward(device, dtype, grouped, has_b1)


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
    (d_ff, d_in), d_out, width = w1.shape, w2.shape[0], index.shape[1]
    tasks = tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        return x.new_empty((0, d_out)), (x.new_empty((0, width)),)
    if places is None:
        places = places_of(index, d_ff)
    x, index = rows16(x), index.contiguous()
    b1, b2 = None if b1 is None else b1.contiguous(), None if b2 is None else b2.contiguous()
    biases = b1 is not None, b2 is not None
    plan = _forward_plan(
        *(x.device, x.dtype, tasks.offsets is not None, biases, d_ff, width),
        *(
            w1.dtype,
            d_in,
            d_out,
            w1.stride(),
            w2.stride(),
            x.stride(0),
            precision(x.dtype),
            ways(x.dtype, task_offsets),
        ),
        aligned(w1, b1, w2, b2, index, places),
    )
    y, h, packed = launching(x.device, plan, x, (w1, b1, w2, b2), index, places, tasks, task_offsets)
    return y, (whole(h, width), packed.fc1, packed.fc2, places)


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
    (d_ff, d_in), d_out, width = w1.shape, w2.shape[0], compact_width(index)
    tasks = tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        zeros = w1.new_zeros
        return x.new_zeros(x.shape), zeros(w1.shape), zeros(d_ff), zeros(w2.shape), zeros(d_out)
    b1 = None if b1 is None else b1.contiguous()
    if not kept:
        index, places = index.contiguous(), places_of(index, d_ff)
        pack = _Pack(d_ff, index.shape[1], x.dtype, (b1 is not None, False), constant=False)
        packed = launching(x.device, pack, w1, b1, w2, None, index, places, torch.float32)
        kept = packed.fc1, packed.fc2, places
    dy, x, h = rows16(dy), rows16(x), _as_wide(h, width)
    plan = _backward_plan(
        *(x.device, x.dtype, tasks.offsets is not None, b1 is not None),
        *(w1.dtype, d_ff, d_in, d_out, width, w1.stride(), w2.stride(), x.stride(0), dy.stride(0)),
        *(precision(x.dtype), ways(x.dtype, task_offsets), aligned(b1, w2, *kept)),
    )
    return launching(x.device, plan, dy, x, (w1, b1, w2), (h, *kept), tasks, task_offsets)


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
