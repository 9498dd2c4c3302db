"""Triton: packs the columns of every task's active neurons, multiplies, and expands the gradients, as ``compact_fc1``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.products import mm_float32
from ..common.triton_launch import Shipped, rows16
from ..common.triton_tasks import compact_width, places_of, refuses, task_sums, tasks_of, tile_sums, whole
from ..compact_fc1.triton_pack import multiply, shipped_packing, wide
from ..row_sparse_wgrad.triton import expand, product_parts


def supports(
    h: Tensor, constant: Tensor | None, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None
) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    if (reason := refuses((w, h.new_empty((h.shape[0], 1)), constant, b), index, h.shape[0])) is not None:
        return reason
    return "a layer has no features" if 0 in w.shape else None


def _others(constant: Tensor, places: Tensor) -> Tensor:
    """The constants of each task's inactive neurons, zero for the active ones, ``[tasks, d_ff]``."""
    return torch.where(places < 0, constant, 0)


def forward(
    h: Tensor, constant: Tensor | None, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None
) -> Tensor:
    """As the reference; what the constants add is summed in float32."""
    d_out, d_ff = w.shape
    tasks = tasks_of(h.shape[0], task_offsets, h.device)
    if tasks.tokens == 0:
        return h.new_empty((0, d_out))
    index = index.contiguous()
    added = None if b is None else b.float().expand(tasks.number, d_out)
    if constant is not None:
        own = mm_float32(_others(constant, places_of(index, d_ff)), w.t())
        added = own if added is None else own + added
    h = wide(h, compact_width(index))
    added = None if added is None else added.contiguous()
    return whole(multiply("y", h, w.t(), None, index, tasks, task_offsets, False, added), d_out)


def backward(
    dy: Tensor, h: Tensor, constant: Tensor | None, w: Tensor, index: Tensor, task_offsets: Tensor | None, has_b: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference; sums over tokens and over tasks are in float32."""
    (d_out, d_ff), tasks = w.shape, tasks_of(h.shape[0], task_offsets, h.device)
    if tasks.tokens == 0:
        none, zeros = h.new_empty(0), h.new_zeros
        dc = none if constant is None else zeros(constant.shape)
        return zeros(h.shape), dc, zeros(w.shape), zeros(d_out) if has_b else none
    index = index.contiguous()
    places, h = places_of(index, d_ff), wide(h, compact_width(index))
    dh = whole(multiply("dx", dy, w.t(), None, index, tasks, task_offsets, to_neurons=True), index.shape[1])
    rows = rows16(dy)
    # With several tasks a column can be active for one and constant for another: rounded once, in the end.
    several = constant is not None and tasks.number > 1
    dw = torch.empty_like(w, dtype=torch.float32 if several else w.dtype, memory_format=torch.contiguous_format)
    expand(*product_parts(h, rows, tasks, task_offsets), places, tasks, dw.t())
    dc, db = h.new_empty(0), h.new_empty(0)
    if has_b or constant is not None:
        s = whole(task_sums(tile_sums(rows, tasks), tasks), d_out)
        db = s.sum(0).to(h.dtype) if has_b else db
    if constant is not None:
        dw.addmm_(s.t().to(dw.dtype), _others(constant, places).to(dw.dtype))
        dc = mm_float32(s.to(w.dtype), w).masked_fill_(places >= 0, 0)
        dc = (dc.sum(0, keepdim=True) if len(constant) == 1 else dc).to(h.dtype)
    return dh, dc, dw.to(w.dtype), db


def shipped(target: str) -> list[Shipped]:
    """The kernels that no other operator lists; ``compact_ffn`` and ``row_sparse_wgrad`` list those that they lend."""
    return [kernel for dtype in (torch.bfloat16, torch.float32) for kernel in shipped_packing(dtype, True)]
