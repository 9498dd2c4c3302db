"""Plain PyTorch; defines what the operator means, on every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks


def forward(dh: Tensor, x: Tensor, active: Tensor, task_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """``dh [tokens, d_ff]``, ``x [tokens, d_in]``, ``active [tasks, d_ff]`` -> ``dw [d_ff, d_in]``, ``db [d_ff]``."""
    segments = checks.segments(task_offsets, dh.shape[0])
    # Sums over tasks are kept in float32 at least, so that the number of tasks costs no precision.
    wide = dh.dtype if len(segments) == 1 else torch.promote_types(dh.dtype, torch.float32)
    dw = x.new_zeros((dh.shape[1], x.shape[1]), dtype=wide)
    for set_, (start, stop) in zip(active, segments):
        rows = set_.nonzero().squeeze(1)
        if len(rows) == len(set_):
            dw += (dh[start:stop].t() @ x[start:stop]).to(wide)
        elif len(rows) and stop > start:
            product = dh[start:stop].index_select(1, rows).t() @ x[start:stop]
            dw.index_add_(0, rows, product.to(wide))
    return dw.to(dh.dtype), dh.sum(0)
