"""Triton: packs the columns of every task's active neurons, multiplies, and expands the gradients, as ``compact_fc1``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.active import places_of
from ..common.products import Ways, by_library, mm_float32, ways
from ..common.triton_launch import aligned, launching, planned, precision, rows16
from ..common.triton_products import Expand, Multiply, Product
from ..common.triton_tasks import Sums, Tasks, compact_width, refuses, tasks_of, whole, wide


def supports(
    h: Tensor, constant: Tensor | None, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None
) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    # Where no neuron is active, h has no columns, and that is no reason.
    reason = refuses((w, h if h.shape[1] else None, constant, b), index, h.shape[0])
    return "a layer has no features" if reason is None and 0 in w.shape else reason


def _others(constant: Tensor, active: Tensor) -> Tensor:
    """The constants of each task's inactive neurons, zero for the active ones, ``[tasks, d_ff]``."""
    return constant.masked_fill(active, 0)


@planned
def _forward_plan(
    device: torch.device, dtype: torch.dtype, grouped: bool, library: bool, added: bool, *alike: Any
) -> Multiply:
    return Multiply(device, dtype, grouped, library, False, added)


class _Backward:
    """The launches of backward passes that are alike in all that Triton compiles for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, way: Ways) -> None:
        self.dh = Multiply(device, dtype, grouped, way.dx, to_neurons=True)
        self.product = Product(device, dtype, grouped, way.dw)
        self.expand, self.sums = Expand(grouped), Sums()

    def __call__(
        self,
        dy: Tensor,
        h: Tensor,
        constant: Tensor | None,
        w: Tensor,
        index: Tensor,
        places: Tensor,
        tasks: Tasks,
        task_offsets: Tensor | None,
        has_b: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dh = whole(self.dh(dy, w.t(), None, index, tasks, task_offsets), index.shape[1])
        one = tasks.number == 1
        # With several tasks a column can be active for one and constant for another: rounded once, in the end.
        several = constant is not None and not one
        dw = w.new_empty(w.shape, dtype=torch.float32 if several else w.dtype)
        self.expand(*self.product(h, dy, tasks, task_offsets), places, tasks, dw.t())
        dc, db = w.new_empty(0), w.new_empty(0)
        if has_b or constant is not None:
            s = whole(self.sums(dy, tasks), w.shape[0])
            rounded = s if not one and constant is None else s.to(w.dtype)
            if has_b:
                db = rounded[0] if one else s.sum(0).to(w.dtype)
        if constant is not None:
            active = places >= 0
            dw.addmm_((s if several else rounded).t(), _others(constant, active).to(dw.dtype))
            dc = mm_float32(rounded, w).masked_fill_(active, 0)
            dc = (dc.sum(0, keepdim=True) if several and len(constant) == 1 else dc).to(w.dtype)
        return dh, dc, dw.to(w.dtype), db


@planned
def _backward_plan(device: torch.device, dtype: torch.dtype, grouped: bool, way: Ways, *alike: Any) -> _Backward:
    return _Backward(device, dtype, grouped, way)


def forward(
    h: Tensor,
    constant: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
) -> Tensor:
    """As the reference; what the constants add is summed in float32."""
    d_out, d_ff = w.shape
    tasks = tasks_of(h.shape[0], task_offsets, h.device)
    if tasks.tokens == 0:
        return h.new_empty((0, d_out))
    index, h = index.contiguous(), wide(h, compact_width(index))
    library, added = by_library("y", h.dtype, task_offsets), b
    if constant is not None:
        places = places_of(index, d_ff) if places is None else places.contiguous()
        own = mm_float32(_others(constant, places >= 0), w.t())
        added = own if b is None else own + b
    if added is not None:
        added = (added if library else added.float()).expand(tasks.number, d_out).contiguous()
    plan = _forward_plan(
        *(h.device, h.dtype, tasks.offsets is not None, library, added is not None),
        *(index.shape[1], w.shape, w.stride(), h.stride(), precision(h.dtype), aligned(h, w, index, added)),
    )
    return whole(launching(h.device, plan, h, w.t(), added, index, tasks, task_offsets), d_out)


def backward(
    dy: Tensor,
    h: Tensor,
    constant: Tensor | None,
    w: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    has_b: bool,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference; sums over tokens and over tasks are in float32."""
    (d_out, d_ff), tasks = w.shape, tasks_of(h.shape[0], task_offsets, h.device)
    if tasks.tokens == 0:
        none, zeros = h.new_empty(0), h.new_zeros
        dc = none if constant is None else zeros(constant.shape)
        return zeros(h.shape), dc, zeros(w.shape), zeros(d_out if has_b else 0)
    index, dy = index.contiguous(), rows16(dy)
    places = places_of(index, d_ff) if places is None else places.contiguous()
    h = wide(h, compact_width(index))
    plan = _backward_plan(
        *(h.device, h.dtype, tasks.offsets is not None, ways(h.dtype, task_offsets)),
        *(index.shape[1], w.shape, w.stride(), dy.stride(0), h.stride(), constant is None or tasks.number == 1),
        *(precision(h.dtype), aligned(h, w, index, places)),
    )
    return launching(h.device, plan, dy, h, constant, w, index, places, tasks, task_offsets, has_b)
