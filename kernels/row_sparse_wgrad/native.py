"""On the CPU, block by block in C++ (``kernels/csrc/row_sparse_wgrad.cpp``): packing, PyTorch's product, scattering.

Dense PyTorch reads dh once for the product and once more for the bias; here one pass serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks, native
from ..common.active import rows_of
from ..common.workspace import workspace


def dense_above(dtype: torch.dtype, d_in: int) -> float:
    """Share of active neurons from which the dense product is faster than packing.

    In float32 the two were equal at 0.9. In 16 bits packing transposes too, which pays at every density where x is wide:
    with d_in 1024 it ran at 1.2x of the dense product at density 1.0; with d_in 512 at 0.94x at 0.78 and 0.79x at 0.9,
    where the dense product with its bias gradient ran at 0.86x.
    """
    if dtype == torch.float32:
        return 0.93
    return 0.85 if d_in < 768 else 1.0


LEAST_TOKENS = 110
"""With several tasks, the tokens' work that each must save (:func:`saved_tokens`) for a product of its own.

Against the dense product, 512 x 2048 and 1024 x 4096, four and eight tasks: with 512 tokens of each at density 0.5 a
product for each 1.23x in float32 and 0.90x in bfloat16, one for all 0.80x and 0.60x; with 256 tokens at 0.78 0.73x and
0.45x against 0.88x and 0.77x.
"""


def supports(dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(dh, x)


def forward(
    dh: Tensor,
    x: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``dh [tokens, d_ff]``, ``x [tokens, d_in]``, ``index [tasks, width]`` -> ``dw [d_ff, d_in]``, ``db [d_ff]``."""
    segments = checks.segments(task_offsets, dh.shape[0])
    if len(segments) == 1:
        return one_task(dh, x, rows_of(index[0]))
    if saved_tokens(dh, index) < LEAST_TOKENS:
        return _together(dh, x, index, segments)
    # Sums over tasks are kept in float32, so that the number of tasks costs no precision.
    dw = torch.zeros((dh.shape[1], x.shape[1]), dtype=torch.float32)
    db = torch.zeros(dh.shape[1], dtype=torch.float32)
    for row, (start, stop) in zip(index, segments):
        if stop > start:
            rows = rows_of(row)
            part, sums = one_task(dh[start:stop], x[start:stop], rows)
            dw.index_add_(0, rows, part.index_select(0, rows).float())
            db += sums
    return dw.to(dh.dtype), db.to(dh.dtype)


def saved_tokens(dh: Tensor, index: Tensor) -> float:
    """Tokens of a task times the share of inactive neurons: how many tokens' work is saved for each task."""
    tasks, width = index.shape
    return dh.shape[0] / max(tasks, 1) * (1 - width / max(dh.shape[1], 1))


def _together(dh: Tensor, x: Tensor, index: Tensor, segments: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """One product over the tokens of all tasks, of a copy of dh in which each task's inactive columns are zero."""
    masked, zero = workspace("wgrad tasks", (dh.shape[0], dh.shape[1]), dh.dtype), dh.new_zeros(())
    for row, (start, stop) in zip(index, segments):
        own = torch.zeros(dh.shape[1], dtype=torch.bool).index_fill_(0, rows_of(row), True)
        torch.where(own, dh[start:stop], zero, out=masked[start:stop])
    return masked.t() @ x, dh.sum(0)


def one_task(dh: Tensor, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for one task with the active neurons ``rows``, int64 ``[n]``."""
    d_ff, full = dh.shape[1], dh.dtype == torch.float32
    if len(rows) <= dense_above(dh.dtype, x.shape[1]) * d_ff:
        return _blocks(dh, x, rows)
    dw, db = _blocks(dh, x, torch.arange(d_ff)) if full else (dh.t() @ x, dh.sum(0))
    if len(rows) < d_ff:
        dw[torch.ones(d_ff, dtype=torch.bool).index_fill_(0, rows, False)] = 0
    return dw, db


def _blocks(dh: Tensor, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    dh, x = native.with_contiguous_rows(dh), native.with_contiguous_rows(x)
    dw, db = dh.new_empty((dh.shape[1], x.shape[1])), dh.new_empty(dh.shape[1])
    ops = torch.ops.nspec_native
    scratch = workspace("wgrad", (ops.row_sparse_wgrad_scratch(dh, x, rows),), torch.uint8)
    ops.row_sparse_wgrad(dh, x, rows, dw, db, scratch)
    return dw, db


def accumulate(
    total: Tensor, dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None, places: Tensor | None = None
) -> Tensor:
    """Adds the weight gradient to ``total``, float32 ``[d_ff, d_in]``, in place; gives ``db [d_ff]``."""
    db = torch.zeros(dh.shape[1], dtype=torch.float32)
    for row, (start, stop) in zip(index, checks.segments(task_offsets, dh.shape[0])):
        rows = rows_of(row)
        # 16-bit products would be rounded before they are added.
        part, sums = one_task(dh[start:stop].float(), x[start:stop].float(), rows)
        total.index_add_(0, rows, part.index_select(0, rows))
        db += sums
    return db.to(dh.dtype)
