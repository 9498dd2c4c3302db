"""On the CPU: PyTorch's products on packed weights; packing and expanding in C++, as in ``compact_ffn/native.py``.

In place, several tasks share one product over the tokens of all, and what is masked is its result or its operand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks, native
from ..common.active import rows_of
from ..common.workspace import workspace
from ..compact_ffn.native import sum_over_tokens


def supports(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(x, w, b)


def _rows(w: Tensor, index: Tensor, fill: bool) -> Tensor:
    """The rows of w in the layout of one task's index, in scratch memory or w itself.

    Where there is no neuron, a row is zero; with ``fill``, a compact one repeats the first active neuron.
    """
    rows = rows_of(index)
    n, width = len(rows), len(index)
    if n == len(w):
        return w
    packed = workspace("w1", (width, w.shape[1]), w.dtype)
    if width == len(w):
        packed.copy_(w)
        return packed.index_fill_(0, (index < 0).nonzero().squeeze(1), 0)
    if fill and n > 0:
        return torch.index_select(w, 0, index.where(index >= 0, rows[0]), out=packed)
    torch.index_select(w, 0, rows, out=packed[:n])
    packed[n:] = 0
    return packed


def _bias(b: Tensor, index: Tensor) -> Tensor:
    """The bias likewise; in place, every neuron keeps its own."""
    if len(index) == len(b):
        return b
    rows = rows_of(index)
    return b.index_select(0, index.where(index >= 0, rows[0])) if len(rows) > 0 else b.new_zeros(len(index))


def forward(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None) -> Tensor:
    """``x [tokens, d_in]``, ``index [tasks, width]`` -> ``z [tokens, width]``."""
    segments = checks.segments(task_offsets, x.shape[0])
    if len(segments) == 1:
        return F.linear(x, _rows(w, index[0], fill=True), None if b is None else _bias(b, index[0]))
    if index.shape[1] == len(w):
        z = F.linear(x, w, b)
        constant = z.new_zeros(()) if b is None else b
        for own, part in zip(index >= 0, z.split(_lengths(segments))):
            torch.where(own, part, constant, out=part)
        return z
    z = x.new_empty((x.shape[0], index.shape[1]))
    for row, (start, stop) in zip(index, segments):
        packed = _rows(w, row, fill=True)
        if b is None:
            torch.mm(x[start:stop], packed.t(), out=z[start:stop])
        else:
            torch.addmm(_bias(b, row), x[start:stop], packed.t(), out=z[start:stop])
    return z


def backward(
    dz: Tensor,
    x: Tensor,
    w: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    has_b: bool,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``w`` and ``b`` (``[0]`` without one) by the formulas of ``reference.py``, summed over tasks.

    In place with several tasks, a NaN in a row of w that some of them use reaches the gradient of x at the tokens of all.
    """
    segments = checks.segments(task_offsets, x.shape[0])
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if len(segments) == 1:
        return dx, *_one_task(dz, x, w, index[0], dx, has_b)
    if index.shape[1] == len(w):
        masked, zero = workspace("dz", tuple(dz.shape), dz.dtype), dz.new_zeros(())
        for own, part, to in zip(index >= 0, dz.split(_lengths(segments)), masked.split(_lengths(segments))):
            torch.where(own, part, zero, out=to)
        torch.mm(masked, w, out=dx)
        dw, db = _sums(masked, x, len(w), has_b)
        unused = (index < 0).all(0)
        return dx, dw.masked_fill_(unused[:, None], 0) if bool(unused.any()) else dw, db
    # Sums over tasks are kept in float32, so that the number of tasks costs no precision.
    sums = [torch.zeros(shape, dtype=torch.float32) for shape in (w.shape, w.shape[:1] if has_b else (0,))]
    for row, (start, stop) in zip(index, segments):
        part = slice(start, stop)
        for total, gradient in zip(sums, _one_task(dz[part], x[part], w, row, dx[part], has_b)):
            total += gradient
    dw, db = (total.to(x.dtype) for total in sums)
    return dx, dw, db


def _lengths(segments: list[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in segments]


def _one_task(dz: Tensor, x: Tensor, w: Tensor, index: Tensor, dx: Tensor, has_b: bool) -> tuple[Tensor, Tensor]:
    """Fills ``dx``; the gradients of ``w`` and ``b``."""
    d_ff, rows = len(w), rows_of(index)
    n = len(rows)
    torch.mm(dz, _rows(w, index, fill=False), out=dx)
    if len(index) == d_ff:
        dw, db = _sums(dz, x, d_ff, has_b)
        if n < d_ff:
            others = (index < 0).nonzero().squeeze(1)
            dw.index_fill_(0, others, 0)
            db = db.index_fill_(0, others, 0) if has_b else db
        return dw, db
    dw, db = _sums(dz, x, d_ff, has_b, n)
    torch.ops.nspec_native.expand_rows_(dw, rows)
    return dw, db.new_zeros(d_ff).index_copy_(0, rows, db[:n]) if has_b else db


def _sums(dz: Tensor, x: Tensor, d_ff: int, has_b: bool, n: int | None = None) -> tuple[Tensor, Tensor]:
    """``dzᵀ x`` in the last rows of ``[d_ff, d_in]``, of the first n columns of dz; the sums of dz over tokens."""
    n = d_ff if n is None else n
    dw, sums = x.new_empty((d_ff, x.shape[1])), dz.new_empty(dz.shape[1] if has_b else 0)
    dz_t = transposed("dz_t", dz, sums)
    sum_over_tokens(dz_t[:n], x, dw[d_ff - n :])
    return dw, sums


def transposed(name: str, matrix: Tensor, sums: Tensor) -> Tensor:
    """``matrix [tokens, columns]`` transposed, as a product reads it best, and its sums over tokens into ``sums``.

    A view in float32; in 16 bits written out, in scratch memory of that name. ``sums`` without elements is not filled.
    """
    if matrix.dtype == torch.float32:
        if sums.numel() > 0:
            torch.sum(matrix, 0, out=sums)
        return matrix.t()
    columns = matrix.shape[1]
    out = workspace(name, (columns, matrix.shape[0]), matrix.dtype)
    rows = native.with_contiguous_rows(matrix)
    torch.ops.nspec_native.pack_columns(rows, torch.arange(columns), True, out, sums)
    return out
