"""Triton: packs the rows of every task's active neurons, multiplies, and expands the gradients, as ``compact_ffn`` does.

The products of one task are the library's (``common/products.py``), those of several tasks in one launch ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.active import places_of
from ..common.products import Ways, by_library, ways
from ..common.triton_launch import aligned, launching, planned, precision, rows16
from ..common.triton_products import Expand, Multiply, Product
from ..common.triton_tasks import Sums, Tasks, compact_width, refuses, tasks_of, whole, wide


def supports(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    return refuses((x, w, b), index, x.shape[0])


@planned
def _forward_plan(
    device: torch.device, dtype: torch.dtype, grouped: bool, library: bool, has_b: bool, in_place: bool, *alike: Any
) -> Multiply:
    return Multiply(device, dtype, grouped, library, True, has_b, in_place, fill=True)


class _Backward:
    """The launches of backward passes that are alike in all that Triton compiles for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, way: Ways, has_b: bool) -> None:
        self.dx = Multiply(device, dtype, grouped, way.dx, to_neurons=False)
        self.product, self.expand = Product(device, dtype, grouped, way.dw), Expand(grouped)
        self.sums = Sums() if has_b else None

    def __call__(
        self, dz: Tensor, x: Tensor, w: Tensor, index: Tensor, places: Tensor, tasks: Tasks, task_offsets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = whole(self.dx(dz, w, None, index, tasks, task_offsets), w.shape[1])
        dw = w.new_empty(w.shape)
        self.expand(*self.product(dz, x, tasks, task_offsets), places, tasks, dw)
        if self.sums is None:
            return dx, dw, x.new_empty(0)
        if tasks.number > 1:
            sums = self.sums(dz, tasks).gather(1, places.clamp(min=0).long())
            return dx, dw, sums.masked_fill_(places < 0, 0).sum(0).to(x.dtype)
        width = dz.shape[1]
        one = dz.new_zeros(width + 1)  # the last is what an inactive neuron has
        torch.sum(dz, 0, out=one[:width])
        return dx, dw, one.index_select(0, places[0] % (width + 1))


@planned
def _backward_plan(
    device: torch.device, dtype: torch.dtype, grouped: bool, way: Ways, has_b: bool, *alike: Any
) -> _Backward:
    return _Backward(device, dtype, grouped, way, has_b)


def forward(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None) -> Tensor:
    """As the reference; the bias is added in float32 with several tasks."""
    tasks = tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        return x.new_empty((0, index.shape[1]))
    index, b = index.contiguous(), None if b is None else b.contiguous()
    plan = _forward_plan(
        *(x.device, x.dtype, tasks.offsets is not None, by_library("y", x.dtype, task_offsets), b is not None),
        *(
            index.shape[1] == len(w),
            index.shape[1],
            w.shape,
            w.stride(),
            x.stride(),
            precision(x.dtype),
            aligned(x, w, b, index),
        ),
    )
    return whole(launching(x.device, plan, x, w, b, index, tasks, task_offsets), index.shape[1])


def backward(
    dz: Tensor,
    x: Tensor,
    w: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    has_b: bool,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; sums over tokens and over tasks are in float32."""
    d_ff, tasks = len(w), tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        return x.new_zeros(x.shape), x.new_zeros(w.shape), x.new_zeros(d_ff if has_b else 0)
    index, x = index.contiguous(), rows16(x)
    places = places_of(index, d_ff) if places is None else places.contiguous()
    dz = wide(dz, compact_width(index))
    plan = _backward_plan(
        *(x.device, x.dtype, tasks.offsets is not None, ways(x.dtype, task_offsets), has_b),
        *(index.shape[1], w.shape, w.stride(), x.stride(0), dz.stride(), precision(x.dtype)),
        aligned(dz, w, index, places),
    )
    return launching(x.device, plan, dz, x, w, index, places, tasks, task_offsets)
