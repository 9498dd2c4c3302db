"""Triton: packs the active columns, multiplies compact operands, and writes every row of the result once.

An active column of dh is a column of two-byte values: a product that gathered them would load two bytes at a time in its
inner loop. So one pass packs the active columns (and sums all of them, for the bias), the product reads whole blocks
through tensor descriptors, and only its rows are gathered.

The tokens are cut into chunks, none with tokens of two tasks; the product of a chunk goes to a part of its own, and the
parts of a row are added up in the order of tasks and chunks. So the result does not depend on which program runs when.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.active import places_of
from ..common.kernels import expand_kernel, pack_columns_kernel, product_kernel
from ..common.products import by_library, launched, mm_float32
from ..common.triton_launch import (
    INTERPRETER,
    SMALL,
    Launcher,
    Shipped,
    aligned,
    cdiv,
    launching,
    planned,
    pointer,
    precision,
    processors,
    rows16,
    target_of,
)
from ..common.triton_tasks import (
    Tasks,
    Tile,
    column_sums,
    columns_launch,
    compact_width,
    refuses,
    tasks_of,
)

#: (1 - width / d_ff) d_in from which packing pays for one task: its pass takes as long as 200 to 320 multiplications of
#: each value (16384 tokens, H100, arithmetic). NOT YET MEASURED: ``python -m bench.gpu.probe --only E5``.
SAVED = 320
MOST_SPLITS = 8  # chunks of a task of average size
ROWS, COLUMNS = 64, 32  # block of the result in the sum over parts; with twice that it spills for 8.0


def product_tile(target: str, dtype: torch.dtype, precise: str) -> Tile:
    """The block sizes of the product on a target."""
    if target == INTERPRETER:
        return Tile(32, 64, 32, 2, 4, 1)
    if dtype == torch.float32:  # without tensor cores ("ieee"), accumulator and operands share the registers
        return Tile(64, 64, 16 if precise == "ieee" else 32, 4, 4, 2)
    return {
        "cuda:80": Tile(128, 256, 32, 4, 8, 4),
        SMALL: Tile(128, 128, 32, 4, 8, 4),
        "cuda:90": Tile(128, 256, 64, 4, 8, 4),
        "cuda:100": Tile(128, 256, 64, 4, 8, 4),
        "hip:gfx942": Tile(128, 128, 32, 4, 8, 2),
    }[target]


def has_tma(target: str) -> bool:
    """Whether devices of a target copy blocks by themselves; the interpreter does as they do."""
    return target in ("cuda:90", "cuda:100", INTERPRETER)


def chunk_of(tasks: Tasks, tiles: int, programs: int, step: int) -> int:
    """Tokens in a chunk, a multiple of ``step``: the fewest that fill the device evenly for tasks of equal size.

    Args:
        tasks: at least one token.
        tiles: blocks of the result of one task.
        programs: how many run side by side.
        step: tokens in a step of the product.
    """
    tokens = cdiv(tasks.tokens, tasks.number)
    items = tiles * tasks.number
    # The time of the product in waves of programs, and of writing and reading a part, a few per cent of a wave each.
    # The latter is arithmetic for 16384 tokens and d_in 1024, NOT YET MEASURED.
    splits = range(1, max(1, min(MOST_SPLITS, tokens // (2 * step))) + 1)
    best = min(splits, key=lambda s: cdiv(items * s, programs) / s * programs / items + 0.03 * s)
    return max(cdiv(cdiv(tokens, best), step), 1) * step


class Product:
    """The product over tokens, in parts, one for each chunk of each task's tokens; for a plan.

    Args:
        device: of the operands.
        dtype: of the operands.
        grouped: whether there are several tasks.
        library: whether the library computes it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, library: bool) -> None:
        self.library = library
        precise, target = precision(dtype), target_of(device)
        self.tile, self.programs = product_tile(target, dtype, precise), processors(device)
        keywords = {"GROUPED": grouped, "TMA": has_tma(target), **self.tile.keywords(precise)}
        self.launcher = Launcher(product_kernel, keywords)

    def __call__(self, left: Tensor, right: Tensor, tasks: Tasks, task_offsets: Tensor | None) -> tuple[Tensor, int]:
        """``leftᵀ right``.

        Args:
            left: ``[tokens, width]``, as ``rows16`` gives it.
            right: ``[tokens, columns]``, likewise.
            tasks: at least one token.
            task_offsets: as the operator got them.

        Returns:
            float32 ``[parts, >= width, >= columns]``, the chunks of a task behind each other; the tokens in a chunk.
        """
        width, columns = left.shape[1], right.shape[1]
        if self.library:
            if tasks.number == 1:
                return mm_float32(left.t(), right)[None], tasks.tokens
            bounds = checks.segments(task_offsets, tasks.tokens)
            products = [mm_float32(left[a:b].t(), right[a:b])[None] for a, b in bounds if a < b]
            return products[0] if len(products) == 1 else torch.cat(products), tasks.tokens
        tile = self.tile
        down, across = cdiv(width, tile.m), cdiv(columns, tile.n)
        chunk = chunk_of(tasks, down * across, self.programs, tile.k)
        count = tasks.most_tiles(chunk)
        parts = torch.empty((count, down * tile.m, across * tile.n), dtype=torch.float32, device=left.device)
        sizes = (tasks.tokens, tasks.number, chunk, width, columns, left.stride(0), right.stride(0))
        self.launcher((count * down * across, 1, 1), left, right, parts, tasks.offsets, *sizes)
        return parts, chunk


class Expand:
    """Rows of the result from what :class:`Product` gives; for a plan.

    Args:
        grouped: whether there are several tasks.
        constant: whether it is the gradient of W2, with what the constants of neurons add that a task has not.
        add: add to a float32 result in the rows that some task has, and touch no other row.
        whole: whether the parts have a row for every neuron, not for every place.
    """

    def __init__(self, grouped: bool, constant: bool = False, add: bool = False, whole: bool = False) -> None:
        self.launcher = Launcher(expand_kernel, expand_launch(grouped, constant, add, whole))

    def __call__(
        self,
        parts: Tensor,
        chunk: int,
        places: Tensor,
        tasks: Tasks,
        out: Tensor,
        constant: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Writes ``out [d_ff, columns]``, of any strides: the sums of the parts in the order of tasks and chunks.

        Args:
            parts: as :class:`Product` gives them.
            chunk: the tokens in a chunk, likewise.
            places: int32 ``[tasks, d_ff]``, see ``places_of``.
            tasks: as for the parts.
            out: any dtype of the kernels.
            constant: b1 ``[d_ff]`` and the sums of dy by task, float32 ``[tasks, columns]``: where a task has not the
                neuron, it adds the product of the two, b1 after ReLU.
        """
        neurons, columns = out.shape
        bias, sums = constant or (None, None)
        sizes = (tasks.tokens, tasks.number, chunk, neurons, columns, *parts.stride()[:2], *out.stride())
        grid = (cdiv(neurons, ROWS), cdiv(columns, COLUMNS), 1)
        self.launcher(grid, parts, places, tasks.offsets, bias, sums, out, *sizes)


def expand_launch(grouped: bool, constant: bool, add: bool, whole: bool = False) -> dict[str, object]:
    """What a launch of ``expand_kernel`` gives by keyword."""
    kinds = {"GROUPED": grouped, "CONSTANT": constant, "ADD": add, "WHOLE": whole}
    return {**kinds, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}


def packs(d_in: int, d_ff: int, width: int, library: bool) -> bool:
    """Whether the active columns of dh are packed; else the product is that of all columns, and its rows are chosen.

    Packing reads dh once, as the sums for db do anyway, and writes its active columns, ``2 (1 + width / d_ff)`` bytes for
    each value of dh in 16 bits; it saves ``2 (1 - width / d_ff) d_in`` operations for each. In the in-place layout there is
    nothing to pack.
    """
    if width == d_ff:
        return False
    return not library or (d_ff - width) * d_in >= SAVED * d_ff


def forward(
    dh: Tensor,
    x: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference; sums are in float32, also within a task."""
    dw = x.new_empty((dh.shape[1], x.shape[1]), dtype=dtype)
    db = _gradient(dw, dh, x, index, task_offsets, places, add=False)
    return dw, db.to(dw.dtype)


def accumulate(
    total: Tensor, dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None, places: Tensor | None = None
) -> Tensor:
    """As the reference."""
    return _gradient(total, dh, x, index, task_offsets, places, add=True).to(dh.dtype)


def _gradient(
    dw: Tensor,
    dh: Tensor,
    x: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None,
    add: bool,
) -> Tensor:
    """Writes dw or adds to it; gives db in float32."""
    tasks = tasks_of(dh.shape[0], task_offsets, dh.device)
    (tokens, d_ff), d_in, width = dh.shape, x.shape[1], index.shape[1]
    if tokens == 0 or width == 0:
        if not add:
            dw.zero_()
        return dh.sum(0, dtype=torch.float32)
    places = places_of(index, d_ff) if places is None else places.contiguous()
    index, x, library = index.contiguous(), rows16(x), by_library("dw", dh.dtype, task_offsets)
    pack = packs(d_in, d_ff, width, library)
    dh = rows16(dh) if not pack else dh if dh.stride(1) == 1 else dh.contiguous()
    plan = _plan(
        *(dh.device, dh.dtype, tasks.offsets is not None, library, pack, add, dw.dtype),
        *(d_ff, d_in, width, dh.stride(0), x.stride(0), dw.stride()),
        *(precision(dh.dtype), aligned(dh, index, places, dw)),
    )
    return launching(dh.device, plan, dw, dh, x, index, places, tasks, task_offsets)


class _Plan:
    """The launches of calls that are alike in all that Triton compiles for."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, grouped: bool, library: bool, pack: bool, add: bool
    ) -> None:
        self.columns = column_sums(grouped, True) if pack else None
        self.product, self.expand = Product(device, dtype, grouped, library), Expand(grouped, add=add, whole=not pack)

    def __call__(
        self,
        dw: Tensor,
        dh: Tensor,
        x: Tensor,
        index: Tensor,
        places: Tensor,
        tasks: Tasks,
        task_offsets: Tensor | None,
    ) -> Tensor:
        left = dh
        if self.columns is None:
            sums = dh[:, : places.shape[1]].sum(0, dtype=torch.float32)  # of all tasks: nothing masks the bias
        else:
            left = dh.new_empty((dh.shape[0], compact_width(index)))
            sums = self.columns(dh, tasks, left, index, places).sum(0)
        self.expand(*self.product(left, x, tasks, task_offsets), places, tasks, dw)
        return sums


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    grouped: bool,
    library: bool,
    pack: bool,
    add: bool,
    *alike: Any,
) -> _Plan:
    return _Plan(device, dtype, grouped, library, pack, add)


def supports(dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    return refuses((dh, x), index, dh.shape[0])


def precisions(target: str, dtype: torch.dtype) -> tuple[str, ...]:
    """What ``precision`` can give on a target."""
    return ("ieee", "tf32") if dtype == torch.float32 and not target.startswith("hip") else ("ieee",)


def shipped(target: str) -> list[Shipped]:
    """Every kernel and configuration that can be launched on a target, in the dtypes that differ in their code."""
    kernels = []
    for dtype in (torch.bfloat16, torch.float32):
        p, name = pointer(dtype), str(dtype).removeprefix("torch.")
        for grouped in (False, True):
            offsets = {"offsets_ptr": "*i64"} if grouped else {}
            none = {} if grouped else {"offsets_ptr": None}
            label = f"{name} {'tasks' if grouped else 'one task'}"
            sizes = dict.fromkeys(
                ("tokens", "tasks", "chunk", "width", "columns", "left_stride", "right_stride"), "i32"
            )
            aligned = ("left_ptr", "right_ptr", "parts_ptr", "width", "columns", "left_stride", "right_stride")
            for precise in precisions(target, dtype):
                if not launched("dw", dtype, grouped, target):
                    continue
                tile = product_tile(target, dtype, precise)
                kernels.append(
                    Shipped(
                        f"product {label} {precise} {tile.m}x{tile.n}",
                        product_kernel,
                        {"left_ptr": p, "right_ptr": p, "parts_ptr": "*fp32", **offsets, **sizes},
                        {"GROUPED": grouped, "TMA": has_tma(target), **none, **tile.keywords(precise)},
                        aligned,
                        ("product32",) if dtype == torch.float32 else ("product16",),
                    )
                )
            kernels += _shipped_columns(label, p, grouped, offsets, none)
            for constant, add, whole in product((False, True), repeat=3):
                if not (constant and (add or whole)):
                    kernels.append(_shipped_expand(label, p, grouped, (constant, add, whole), offsets, none))
    return kernels


def _shipped_columns(label: str, p: str, grouped: bool, offsets: dict, none: dict) -> list[Shipped]:
    sizes = dict.fromkeys(("tokens", "tasks", "columns", "width", "dense_stride", "packed_stride"), "i32")
    signature = {"dense_ptr": p, "sums_ptr": "*fp32", **offsets}
    packing = {"packed_ptr": p, "index_ptr": "*i64", "places_ptr": "*i32"}
    aligned = ("dense_ptr", "sums_ptr", *packing, "columns", "width", "dense_stride", "packed_stride")
    pack = Shipped(
        f"pack columns {label}",
        pack_columns_kernel,
        {**signature, **packing, **sizes},
        {**none, **columns_launch(grouped, True)},
        aligned,
        covered=not grouped,
    )
    if not grouped:
        return [pack]  # PyTorch sums the columns of one task
    absent = dict.fromkeys(packing)
    sums = Shipped(
        f"sums of tiles {label}",
        pack_columns_kernel,
        {**signature, **sizes},
        {**none, **absent, **columns_launch(grouped, False)},
        tuple(name for name in aligned if name not in packing),
        covered=True,
    )
    return [pack, sums]


def _shipped_expand(
    label: str, p: str, grouped: bool, kind: tuple[bool, bool, bool], offsets: dict, none: dict
) -> Shipped:
    constant, add, whole = kind
    strides = ("part_stride", "row_stride", "out_stride", "out_column_stride")
    sizes = dict.fromkeys(("tokens", "tasks", "chunk", "neurons", "columns", *strides), "i32")
    # dW1 and dW are rows of d_in; dW2 is written down its columns.
    sizes.pop("out_stride" if constant else "out_column_stride")
    one = {"out_stride" if constant else "out_column_stride": 1}
    signature = {"parts_ptr": "*fp32", "places_ptr": "*i32", "out_ptr": "*fp32" if add else p, **offsets, **sizes}
    if constant:
        signature |= {"bias_ptr": p, "sums_ptr": "*fp32"}
    else:
        none = {**none, "bias_ptr": None, "sums_ptr": None}
    aligned = [name for name in signature if name not in ("tokens", "tasks", "chunk", "offsets_ptr")]
    name = "expand to columns" if constant else "add rows" if add else "expand"
    return Shipped(
        f"{name}{' of whole parts' if whole else ''} {label}",
        expand_kernel,
        signature,
        {**none, **one, **expand_launch(grouped, constant, add, whole)},
        aligned,
        covered=whole or not grouped or not (constant or add),
    )
