"""Plain PyTorch; defines what the operator means, on every device and dtype.

For one task with active neurons A and the others I, r = relu(b1[I]) and s = the sum of dy over tokens:

    h = relu(x W1[A]ᵀ + b1[A])          y = h W2[:, A]ᵀ + (b2 + W2[:, I] r)
    dh = (dy W2[:, A]) ⊙ [h > 0]        dx = dh W1[A]
    dW1[A] = dhᵀ x,  dW1[I] = 0         db1[A] = Σ dh,  db1[I] = (s W2[:, I]) ⊙ [b1[I] > 0]
    dW2[:, A] = dyᵀ h,  dW2[:, I] = s rᵀ (rank one)      db2 = s

This equals the dense block with the inactive rows of W1 set to zero, exactly: a deselected neuron is not silent, its
output is the constant relu(b1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import checks
from ..common.active import rows_of


class Packed(NamedTuple):
    """The weights of one task in the layout of its index row (see ``common/active.py``); ``width`` is its length.

    Shapes: ``w1 [width, d_in]``, ``b1 [width]`` or None, ``w2 [d_out, width]``, ``constant [d_out]`` or None. Padding
    rows and columns are zero.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    constant: Tensor | None


def pack(w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor) -> Packed:
    """Gathers what one task needs; ``index`` int64 ``[width]``."""
    d_ff = w1.shape[0]
    inactive = index < 0
    if len(index) == d_ff:
        w1 = w1.masked_fill(inactive[:, None], 0) if bool(inactive.any()) else w1
        return Packed(w1, b1, w2, b2)
    rows = index.clamp(min=0)
    active = len(index) - int(inactive.sum())
    # gather: index_select along the last dimension takes 3x as long in bfloat16 on a CPU (0.34 against 0.10 ms, 256 x 896)
    w1c, w2c = w1.index_select(0, rows), w2.gather(1, rows.expand(w2.shape[0], -1))
    w1c[active:], w2c[:, active:] = 0, 0
    if b1 is None:
        return Packed(w1c, None, w2c, b2)
    b1c = b1.index_select(0, rows)
    b1c[active:] = 0
    constant = w2 @ _constant(b1, index[:active])
    return Packed(w1c, b1c, w2c, constant if b2 is None else constant + b2)


def _constant(b1: Tensor, rows: Tensor) -> Tensor:
    """relu(b1) where inactive, zero where active, ``[d_ff]``."""
    return torch.relu(b1).index_fill(0, rows, 0)


def forward_packed(x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """``x [tokens, d_in]`` -> ``y [tokens, d_out]``, ``h [tokens, width]``."""
    h = torch.nn.functional.linear(x, packed.w1, packed.b1).relu_()
    return torch.nn.functional.linear(h, packed.w2, packed.constant), h


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
    """``index [tasks, width]`` -> ``y [tokens, d_out]``, and what the backward reads: ``h [tokens, width]``.

    A backend may keep more behind h, which its backward is given then; ``places`` (``places_of(index)``) may help it.
    """
    segments = checks.segments(task_offsets, x.shape[0])
    if len(segments) == 1:
        y, h = forward_packed(x, pack(w1, b1, w2, b2, index[0]))
        return y, (h,)
    y, h = x.new_empty((x.shape[0], w2.shape[0])), x.new_empty((x.shape[0], index.shape[1]))
    for row, (start, stop) in zip(index, segments):
        y[start:stop], h[start:stop] = forward_packed(x[start:stop], pack(w1, b1, w2, b2, row))
    return y, (h,)


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``w1``, ``b1``, ``w2``, ``b2`` by the formulas above, summed over tasks."""
    segments = checks.segments(task_offsets, x.shape[0])
    if len(segments) == 1:
        return _backward_one(dy, x, w1, b1, w2, index[0], h)
    # Sums over tasks are kept in float32 at least, so that the number of tasks costs no precision.
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x)
    sums = [torch.zeros(s, dtype=wide, device=x.device) for s in (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])]
    for row, (start, stop) in zip(index, segments):
        part = slice(start, stop)
        dx[part], *gradients = _backward_one(dy[part], x[part], w1, b1, w2, row, h[part])
        for total, gradient in zip(sums, gradients):
            total += gradient
    dw1, db1, dw2, db2 = (total.to(x.dtype) for total in sums)
    return dx, dw1, db1, dw2, db2


def _backward_one(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, index: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed = pack(w1, b1, w2, None, index)
    dh = dy @ packed.w2
    torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)  # in place: a fresh buffer costs page faults
    dx = dh @ packed.w1
    s = dy.sum(0)
    rows = rows_of(index)
    if len(index) == w1.shape[0]:
        dw1 = dh.t() @ x
        if len(rows) < len(index):
            dw1.masked_fill_((index < 0)[:, None], 0)
        return dx, dw1, dh.sum(0), dy.t() @ h, s
    n = len(rows)
    dw1 = torch.zeros_like(w1, memory_format=torch.contiguous_format).index_copy_(0, rows, (dh.t() @ x)[:n])
    dw2c = (dy.t() @ h)[:, :n]
    if b1 is None:
        dw2 = torch.zeros_like(w2, memory_format=torch.contiguous_format).index_copy_(1, rows, dw2c)
        return dx, dw1, dh.new_zeros(w1.shape[0]), dw2, s
    dw2 = torch.outer(s, _constant(b1, rows)).index_copy_(1, rows, dw2c)
    db1 = ((s @ w2) * (b1 > 0)).index_copy_(0, rows, dh.sum(0)[:n])
    return dx, dw1, db1, dw2, s
