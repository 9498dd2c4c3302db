"""Triton: packs the active columns, multiplies compact operands, and writes every row of the result once.

An active column of dh is a column of two-byte values: a product that gathered them would load two bytes at a time in its
inner loop. So one pass packs the active columns (and sums all of them, for the bias), the product reads whole blocks
through tensor descriptors, and only its rows are gathered.

The tokens are cut into chunks, none with tokens of two tasks; the product of a chunk goes to a part of its own, and the
parts of a row are added up in the order of tasks and chunks. So the result does not depend on which program runs when.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.active import places_of
from ..common.products import by_library
from ..common.triton_launch import aligned, launching, planned, precision, rows16
from ..common.triton_products import Expand, Product
from ..common.triton_tasks import Tasks, column_sums, compact_width, refuses, tasks_of

#: (1 - width / d_ff) d_in from which packing pays for one task: its pass takes as long as 200 to 320 multiplications of
#: each value (16384 tokens, H100, arithmetic). NOT YET MEASURED: ``python -m bench.gpu.probe --only E5``.
SAVED = 320


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
