"""On the CPU: PyTorch's matrix products on packed weights; packing, masking and expanding in C++ (``kernels/csrc``).

What makes it fast, besides the smaller products: scratch memory is kept between calls (page faults took up to a sixth of
the time), the products of the weight gradients are written into the end of the results and expanded there, one pass over
dh applies the ReLU mask and sums up the bias gradient, and in 16-bit types what a product reads transposed is written
transposed (see ``row_sparse_wgrad/native.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common import checks, native
from ..common.active import rows_of
from ..common.workspace import workspace
from . import reference
from .reference import Packed, forward_packed

# Elements of a 16-bit product up to which its rows are shared out to the threads here: PyTorch left one of two cores idle
# there (bfloat16 with AMX, 640 x 4096 by 4096 x 512: 1.26 against 1.96 TFLOP/s), and was up to 10 % faster above.
SPLIT_BELOW = 1152 * 512


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor, task_offsets: Tensor | None
) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(x, w1, b1, w2, b2)


def pack(w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor, scratch: bool = False) -> Packed:
    """Gathers what one task needs, as ``reference.pack``.

    Args:
        w1: ``[d_ff, d_in]``.
        b1: ``[d_ff]`` or None.
        w2: ``[d_out, d_ff]``.
        b2: ``[d_out]`` or None.
        index: int64 ``[width]``.
        scratch: whether the matrices are in scratch memory, valid until this thread's next call.
    """
    (d_ff, d_in), d_out, width = w1.shape, w2.shape[0], len(index)
    if width == d_ff or w2.stride(-1) != 1:
        return reference.pack(w1, b1, w2, b2, index)
    make = workspace if scratch else lambda _, shape, dtype: torch.empty(shape, dtype=dtype)
    w1c, w2c = make("w1", (width, d_in), w1.dtype), make("w2", (d_out, width), w2.dtype)
    rows = rows_of(index)
    n = len(rows)
    torch.index_select(w1, 0, rows, out=w1c[:n])
    w1c[n:] = 0
    torch.ops.nspec_native.pack_columns(w2, rows, False, w2c, w2.new_empty(0))
    if b1 is None:
        return Packed(w1c, None, w2c, b2)
    b1c = F.pad(b1.index_select(0, rows), (0, width - n))
    constant = w2 @ torch.relu(b1).index_fill_(0, rows, 0)
    return Packed(w1c, b1c, w2c, constant if b2 is None else constant + b2)


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
    """As the reference. The packed weights are scratch memory and not kept."""
    segments = checks.segments(task_offsets, x.shape[0])
    if len(segments) == 1:
        y, h = forward_packed(x, pack(w1, b1, w2, b2, index[0], scratch=True))
        return y, (h,)
    y, h = x.new_empty((x.shape[0], w2.shape[0])), x.new_empty((x.shape[0], index.shape[1]))
    for row, (start, stop) in zip(index, segments):
        part = slice(start, stop)
        y[part], h[part] = forward_packed(x[part], pack(w1, b1, w2, b2, row, scratch=True))
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
    """Gradients of ``x``, ``w1``, ``b1``, ``w2``, ``b2`` by the formulas of ``reference.py``, summed over tasks."""
    segments = checks.segments(task_offsets, x.shape[0])
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if len(segments) == 1:
        return dx, *_one_task(dy, x, w1, b1, w2, index[0], h, dx)
    shapes = w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]
    # Sums over tasks are kept in float32, so that the number of tasks costs no precision.
    sums = [torch.zeros(shape, dtype=torch.float32) for shape in shapes]
    for row, (start, stop) in zip(index, segments):
        part = slice(start, stop)
        for total, gradient in zip(sums, _one_task(dy[part], x[part], w1, b1, w2, row, h[part], dx[part])):
            total += gradient
    dw1, db1, dw2, db2 = (total.to(x.dtype) for total in sums)
    return dx, dw1, db1, dw2, db2


def _one_task(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, index: Tensor, h: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fills ``dx``; the gradients of ``w1``, ``b1``, ``w2``, ``b2``."""
    ops = torch.ops.nspec_native
    d_ff, (tokens, width) = w1.shape[0], h.shape
    rows, none = rows_of(index), dy.new_empty(0)
    n, transposed = len(rows), dy.dtype != torch.float32
    packed = pack(w1, b1, w2, None, index, scratch=True)
    dh = torch.mm(dy, packed.w2, out=workspace("dh", (tokens, width), dy.dtype))
    sums, s = dy.new_empty(width), dy.new_empty(dy.shape[1])
    dh_t = workspace("dh_t", (width, tokens), dy.dtype) if transposed else none
    ops.relu_backward_(dh, h, dh_t, sums)
    torch.mm(dh, packed.w1, out=dx)
    if transposed:
        dy_t = workspace("dy_t", (dy.shape[1], tokens), dy.dtype)
        ops.pack_columns(native.with_contiguous_rows(dy), torch.arange(dy.shape[1]), True, dy_t, s)
    else:
        dh_t, dy_t = dh.t(), dy.t()
        torch.sum(dy, 0, out=s)
    dw1, dw2 = w1.new_empty(w1.shape), w2.new_empty(w2.shape)
    _sum_over_tokens(dy_t, h, dw2[:, d_ff - width :])
    if width == d_ff:
        _sum_over_tokens(dh_t, x, dw1)
        if n < d_ff:
            dw1.masked_fill_((index < 0)[:, None], 0)
        return dw1, sums, dw2, s
    _sum_over_tokens(dh_t[:n], x, dw1[d_ff - n :])
    ops.expand_rows_(dw1, rows)
    ops.expand_columns_(dw2, rows, width, s, none if b1 is None else torch.relu(b1))
    if b1 is None:
        return dw1, sums.new_zeros(d_ff), dw2, s
    db1 = ((s @ w2) * (b1 > 0)).index_copy_(0, rows, sums[:n])
    return dw1, db1, dw2, s


def _sum_over_tokens(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a b``, a product with many tokens inside and few elements outside."""
    if out.dtype != torch.float32 and out.numel() <= SPLIT_BELOW:
        torch.ops.nspec_native.product_(out, a, b, out.new_empty(0))
    else:
        torch.mm(a, b, out=out)
