"""Triton: packs the rows of every task's active neurons, multiplies, and expands the gradients, as ``compact_ffn`` does.

The products of one task are the library's (``common/products.py``), those of several tasks in one launch ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.triton_launch import Shipped, rows16
from ..common.triton_tasks import compact_width, places_of, refuses, task_sums, tasks_of, tile_sums, whole
from ..row_sparse_wgrad.triton import expand, product_parts
from .triton_pack import multiply, shipped_packing, wide


def supports(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    return refuses((x, w, b), index, x.shape[0])


def forward(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None) -> Tensor:
    """As the reference; the bias is added in float32 with several tasks."""
    tasks = tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        return x.new_empty((0, index.shape[1]))
    index, b = index.contiguous(), None if b is None else b.contiguous()
    z = multiply("y", x, w, b, index, tasks, task_offsets, to_neurons=True)
    return whole(z, index.shape[1])


def backward(
    dz: Tensor, x: Tensor, w: Tensor, index: Tensor, task_offsets: Tensor | None, has_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; sums over tokens and over tasks are in float32."""
    (d_ff, d_in), tasks = w.shape, tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        return x.new_zeros(x.shape), x.new_zeros(w.shape), x.new_zeros(d_ff if has_b else 0)
    index = index.contiguous()
    places, dz = places_of(index, d_ff), wide(dz, compact_width(index))
    dx = whole(multiply("dx", dz, w, None, index, tasks, task_offsets, to_neurons=False), d_in)
    dw = w.new_empty(w.shape)
    expand(*product_parts(dz, rows16(x), tasks, task_offsets), places, tasks, dw)
    if not has_b:
        return dx, dw, x.new_empty(0)
    sums = task_sums(tile_sums(dz, tasks), tasks).gather(1, places.clamp(min=0).long())
    return dx, dw, sums.masked_fill_(places < 0, 0).sum(0).to(x.dtype)


def shipped(target: str) -> list[Shipped]:
    """The kernels that no other operator lists; ``compact_ffn`` and ``row_sparse_wgrad`` list those that they lend."""
    return [kernel for dtype in (torch.bfloat16, torch.float32) for kernel in shipped_packing(dtype, False)]
