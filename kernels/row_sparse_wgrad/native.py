"""On the CPU: the active columns of dh are packed in C++, PyTorch multiplies, and the rows go to their places in C++.

Packing gives the sums for the bias in the same pass. The product is written into the end of the result, and the rows move
up to their places: no second buffer. In 16-bit types the packed columns are written transposed, since PyTorch's product
with a transposed view takes twice as long there (bfloat16 with AMX, 2048 x 4096 by 2048 x 1024: 15.4 against 7.3 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common import checks, native
from ..common.active import rows_of
from ..common.workspace import workspace


def supports(dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(dh, x)


def forward(dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """``dh [tokens, d_ff]``, ``x [tokens, d_in]``, ``index [tasks, width]`` -> ``dw [d_ff, d_in]``, ``db [d_ff]``."""
    segments = checks.segments(task_offsets, dh.shape[0])
    if len(segments) == 1:
        return _one_task(dh, x, index[0])
    total = torch.zeros((dh.shape[1], x.shape[1]), dtype=torch.float32)
    db = _add(total, dh, x, index, segments, lambda a, b: torch.mm(a, b).float())
    return total.to(dh.dtype), db


def _one_task(dh: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    d_ff = dh.shape[1]
    rows = rows_of(index)
    dw, db = dh.new_empty((d_ff, x.shape[1])), dh.new_empty(d_ff)
    n = len(rows)
    torch.mm(packed_columns(dh, rows, db), x, out=dw[d_ff - n :])
    torch.ops.nspec_native.expand_rows_(dw, rows)
    return dw, db


def packed_columns(dh: Tensor, rows: Tensor, db: Tensor) -> Tensor:
    """``[n, tokens]``, the columns ``rows`` of ``dh`` (valid until the next call); fills ``db`` with all columns' sums."""
    tokens, n = dh.shape[0], len(rows)
    if dh.stride(-1) != 1:
        dh = dh.contiguous()
    pack = torch.ops.nspec_native.pack_columns
    if dh.dtype != torch.float32:
        packed = workspace("dh", (n, tokens), dh.dtype)
        pack(dh, rows, True, packed, db)
        return packed
    if n == dh.shape[1]:
        torch.sum(dh, 0, out=db)
        return dh.t()
    # Rows of a multiple of 16 elements: others lose a third of the product's speed.
    packed = workspace("dh", (tokens, -(-n // 16) * 16), dh.dtype)
    pack(dh, rows, False, packed, db)
    return packed[:, :n].t()


def accumulate(total: Tensor, dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None) -> Tensor:
    """Adds the weight gradient to ``total``, float32 ``[d_ff, d_in]``, in place; gives ``db [d_ff]``."""
    segments = checks.segments(task_offsets, dh.shape[0])
    return _add(total, dh, x, index, segments, lambda a, b: torch.mm(a.float(), b.float()))


def _add(
    total: Tensor,
    dh: Tensor,
    x: Tensor,
    index: Tensor,
    segments: Sequence[tuple[int, int]],
    product: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    db = torch.zeros(dh.shape[1], dtype=torch.float32)
    part = dh.new_empty(dh.shape[1])
    for row, (start, stop) in zip(index, segments):
        rows = rows_of(row)
        packed = packed_columns(dh[start:stop], rows, part)
        total.index_add_(0, rows, product(packed, x[start:stop]))
        db += part
    return db.to(dh.dtype)
