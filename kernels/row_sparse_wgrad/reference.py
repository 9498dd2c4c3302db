"""Plain PyTorch; defines what the operator means, on every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks
from ..common.active import rows_of


def forward(
    dh: Tensor,
    x: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``dh [tokens, d_ff]``, ``x [tokens, d_in]``, ``index [tasks, width]`` -> ``dw [d_ff, d_in]``, ``db [d_ff]``.

    ``places`` (``places_of(index)``) may help another backend; ``dtype`` is that of the result, if it can give it.
    """
    segments = checks.segments(task_offsets, dh.shape[0])
    # Sums over tasks are kept in float32 at least, so that the number of tasks costs no precision.
    wide = dh.dtype if len(segments) == 1 else torch.promote_types(dh.dtype, torch.float32)
    dw = x.new_zeros((dh.shape[1], x.shape[1]), dtype=wide)
    for row, (start, stop) in zip(index, segments):
        rows = rows_of(row)
        product = dh[start:stop].index_select(1, rows).t() @ x[start:stop]
        dw.index_add_(0, rows, product.to(wide))
    return dw.to(dtype or dh.dtype), dh.sum(0)


def accumulate(
    total: Tensor, dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None, places: Tensor | None = None
) -> Tensor:
    """Adds the weight gradient to ``total``, float32 ``[d_ff, d_in]``, in place; gives ``db [d_ff]``."""
    for row, (start, stop) in zip(index, checks.segments(task_offsets, dh.shape[0])):
        rows = rows_of(row)
        product = dh[start:stop].index_select(1, rows).float().t() @ x[start:stop].float()
        total.index_add_(0, rows, product)
    return dh.sum(0)
