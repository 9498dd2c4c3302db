"""Plain PyTorch; defines what the operator means, on every device and dtype.

For one task with active neurons A and the others I, c the constant outputs of I and s the sum of dy over tokens:

    y = h[:, A] W[:, A]ᵀ + (b + W[:, I] c[I])
    dh[:, A] = dy W[:, A],  dh elsewhere = 0     dc[I] = s W[:, I],  dc[A] = 0
    dW[:, A] = dyᵀ h[:, A],  dW[:, I] = s cᵀ (rank one)      db = s

Without a constant, c is zero, and the columns I of W are neither read nor given a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks
from ..compact_fc1.reference import places_and_rows


def others_of(rows: Tensor, d_ff: int) -> Tensor:
    """The neurons that are not in ``rows``, in rising order."""
    return torch.ones(d_ff, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False).nonzero().squeeze(1)


def forward(
    h: Tensor,
    constant: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
) -> Tensor:
    """``h [tokens, width]``, ``constant [1 or tasks, d_ff]``, ``index [tasks, width]`` -> ``y [tokens, d_out]``.

    Of differentiable operations alone, none of them in place, with the derivatives above.
    """
    segments = checks.segments(task_offsets, h.shape[0])
    parts = []
    for task, (row, (start, stop)) in enumerate(zip(index, segments)):
        places, rows = places_and_rows(row)
        added = b
        if constant is not None:
            others = others_of(rows, w.shape[1])
            c = constant[task if constant.shape[0] > 1 else 0]
            added = w.index_select(1, others) @ c.index_select(0, others)
            added = added if b is None else added + b
        parts.append(F.linear(h[start:stop].index_select(1, places), w.index_select(1, rows), added))
    return parts[0] if len(parts) == 1 else torch.cat([h.new_zeros((0, w.shape[0])), *parts])


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
    """Gradients of ``h``, ``constant``, ``w`` and ``b`` by the formulas above, summed over tasks.

    That of what is not given is ``[0]``.
    """
    segments = checks.segments(task_offsets, h.shape[0])
    # Sums over tasks are kept in float32 at least, so that the number of tasks costs no precision.
    wide = h.dtype if len(segments) == 1 else torch.promote_types(h.dtype, torch.float32)
    dh = torch.zeros_like(h, memory_format=torch.contiguous_format)
    shapes = (0,) if constant is None else constant.shape, w.shape, w.shape[:1]
    dc, dw, db = (torch.zeros(shape, dtype=wide, device=h.device) for shape in shapes)
    for task, (row, (start, stop)) in enumerate(zip(index, segments)):
        places, rows = places_and_rows(row)
        part, s = dy[start:stop], dy[start:stop].sum(0)
        own = h[start:stop].index_select(1, places)
        dh[start:stop] = dh[start:stop].index_copy(1, places, part @ w.index_select(1, rows))
        dw.index_add_(1, rows, (part.t() @ own).to(wide))
        db += s
        if constant is not None:
            others, of = others_of(rows, w.shape[1]), task if constant.shape[0] > 1 else 0
            dc[of].index_add_(0, others, (s @ w.index_select(1, others)).to(wide))
            dw.index_add_(1, others, torch.outer(s, constant[of].index_select(0, others)).to(wide))
    return dh, dc.to(h.dtype), dw.to(h.dtype), db.to(h.dtype) if has_b else h.new_empty(0)
