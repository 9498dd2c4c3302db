"""Plain PyTorch; defines what the operator means, on every device and dtype.

For one task with active neurons A and the others I:

    z[:, A] = x W[A]ᵀ + b[A]
    dx = dz[:, A] W[A]      dW[A] = dz[:, A]ᵀ x,  dW[I] = 0      db[A] = Σ dz[:, A],  db[I] = 0

z is in the layout of the index. What stands at its other positions is a constant for the derivative, and its gradient is
ignored: compact, the padding repeats the first active neuron (0 where there is none), so that no function of z meets a
value there that it does not meet elsewhere; in place, an inactive neuron has its bias (0 without one).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks


def places_and_rows(index: Tensor) -> tuple[Tensor, Tensor]:
    """Of one task's row of the index, where its neurons are in the layout, and which they are: int64 ``[n]`` each."""
    places = (index >= 0).nonzero().squeeze(1)
    return places, index.index_select(0, places)


def forward(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None) -> Tensor:
    """``x [tokens, d_in]``, ``index [tasks, width]`` -> ``z [tokens, width]``.

    Of differentiable operations alone, none of them in place, with the derivatives above.
    """
    segments = checks.segments(task_offsets, x.shape[0])
    parts = [_forward_one(x[start:stop], w, b, row) for row, (start, stop) in zip(index, segments)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([x.new_zeros((0, index.shape[1])), *parts])


def _forward_one(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor) -> Tensor:
    places, rows = places_and_rows(index)
    active = F.linear(x, w.index_select(0, rows), None if b is None else b.index_select(0, rows))
    if len(rows) == len(index):
        return active
    if len(index) == w.shape[0] and b is not None:
        others = b.detach()[None].expand(x.shape[0], -1)
    elif len(index) == w.shape[0] or len(rows) == 0:
        others = x.new_zeros((x.shape[0], len(index)))
    else:
        others = active.detach()[:, :1].expand(-1, len(index))
    return others.index_copy(1, places, active)


def backward(
    dz: Tensor,
    x: Tensor,
    w: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    has_b: bool,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``w`` and ``b`` (``[0]`` without one) by the formulas above, summed over tasks.

    ``places`` (``places_of(index)``) may help a backend.
    """
    segments = checks.segments(task_offsets, x.shape[0])
    # Sums over tasks are kept in float32 at least, so that the number of tasks costs no precision.
    wide = x.dtype if len(segments) == 1 else torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw, db = (torch.zeros(shape, dtype=wide, device=x.device) for shape in (w.shape, w.shape[:1]))
    for row, (start, stop) in zip(index, segments):
        places, rows = places_and_rows(row)
        own, part = dz[start:stop].index_select(1, places), x[start:stop]
        dx[start:stop] = own @ w.index_select(0, rows)
        dw.index_add_(0, rows, (own.t() @ part).to(wide))
        db.index_add_(0, rows, own.sum(0).to(wide))
    return dx, dw.to(x.dtype), db.to(x.dtype) if has_b else x.new_empty(0)
