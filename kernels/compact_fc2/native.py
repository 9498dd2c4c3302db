"""On the CPU: PyTorch's products on packed weights; packing and expanding in C++, as in ``compact_ffn/native.py``.

In place, several tasks share one product over the tokens of all, of a copy of h that holds the constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks, native
from ..common.active import rows_of
from ..common.workspace import workspace
from ..compact_fc1.native import transposed
from ..compact_ffn.native import sum_over_tokens


def supports(
    h: Tensor, constant: Tensor | None, w: Tensor, b: Tensor | None, index: Tensor, task_offsets: Tensor | None
) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(h, constant, w, b)


def _columns(w: Tensor, index: Tensor) -> Tensor:
    """The columns of w in the layout of one task's index, zero without a neuron; in scratch memory, or w itself."""
    rows = rows_of(index)
    if len(rows) == w.shape[1]:
        return w
    packed = workspace("w2", (w.shape[0], len(index)), w.dtype)
    if len(index) == w.shape[1]:
        return torch.where(index >= 0, w, w.new_zeros(()), out=packed)
    torch.ops.nspec_native.pack_columns(native.with_contiguous_rows(w), rows, False, packed, w.new_empty(0))
    return packed


def _added(constant: Tensor | None, w: Tensor, b: Tensor | None, index: Tensor) -> Tensor | None:
    """``b + W[:, I] c[I]``."""
    rows = rows_of(index)
    if constant is None or len(rows) == w.shape[1]:
        return b
    others = constant.index_fill(0, rows, 0)
    return w @ others if b is None else torch.addmv(b, w, others)


def _of_task(constant: Tensor | None, task: int) -> Tensor | None:
    return None if constant is None else constant[task if len(constant) > 1 else 0]


def forward(
    h: Tensor,
    constant: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
) -> Tensor:
    """``h [tokens, width]``, ``constant [1 or tasks, d_ff]``, ``index [tasks, width]`` -> ``y [tokens, d_out]``."""
    segments = checks.segments(task_offsets, h.shape[0])
    if len(segments) == 1:
        return F.linear(h, _columns(w, index[0]), _added(_of_task(constant, 0), w, b, index[0]))
    if index.shape[1] == w.shape[1]:
        return F.linear(_with_constants(h, constant, index, segments), w, b)
    y = h.new_empty((h.shape[0], w.shape[0]))
    for task, (row, (start, stop)) in enumerate(zip(index, segments)):
        packed, added = _columns(w, row), _added(_of_task(constant, task), w, b, row)
        if added is None:
            torch.mm(h[start:stop], packed.t(), out=y[start:stop])
        else:
            torch.addmm(added, h[start:stop], packed.t(), out=y[start:stop])
    return y


def _with_constants(h: Tensor, constant: Tensor | None, index: Tensor, segments: list[tuple[int, int]]) -> Tensor:
    """In place: a copy of h in scratch memory in which inactive neurons have their constants."""
    whole = workspace("h", tuple(h.shape), h.dtype)
    for task, (own, (start, stop)) in enumerate(zip(index >= 0, segments)):
        value = _of_task(constant, task)
        torch.where(own, h[start:stop], h.new_zeros(()) if value is None else value, out=whole[start:stop])
    return whole


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
    """Gradients of ``h``, ``constant``, ``w`` and ``b`` by the formulas of ``reference.py``, summed over tasks.

    That of what is not given is ``[0]``. In place with several tasks, a NaN in an inactive column of w counts.
    """
    segments = checks.segments(task_offsets, h.shape[0])
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    if len(segments) == 1:
        dc, dw, s = _one_task(dy, h, _of_task(constant, 0), w, index[0], dh, has_b)
        return dh, dc if constant is None else dc[None], dw, s if has_b else s.new_empty(0)
    if index.shape[1] == w.shape[1]:
        return dh, *_together(dy, h, constant, w, index, segments, dh, has_b)
    # Sums over tasks are kept in float32, so that the number of tasks costs no precision.
    shapes = (0,) if constant is None else constant.shape, w.shape, w.shape[:1] if has_b else (0,)
    dc, dw, db = (torch.zeros(shape, dtype=torch.float32) for shape in shapes)
    for task, (row, (start, stop)) in enumerate(zip(index, segments)):
        part, value = slice(start, stop), _of_task(constant, task)
        own_dc, own_dw, s = _one_task(dy[part], h[part], value, w, row, dh[part], has_b)
        dw += own_dw
        if has_b:
            db += s
        if constant is not None:
            dc[task if len(constant) > 1 else 0] += own_dc
    return dh, dc.to(h.dtype), dw.to(h.dtype), db.to(h.dtype)


def _one_task(
    dy: Tensor, h: Tensor, constant: Tensor | None, w: Tensor, index: Tensor, dh: Tensor, has_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ``dh``; the gradients of the constant and of ``w``, and the sums of dy where somebody needs them."""
    rows, (d_out, d_ff), width = rows_of(index), w.shape, len(index)
    none = w.new_empty(0)
    if len(rows) == d_ff and constant is not None:
        dc, constant = torch.zeros_like(constant), None  # nobody is inactive
    else:
        dc = none
    torch.mm(dy, _columns(w, index), out=dh)
    s = dy.new_empty(d_out if has_b or constant is not None else 0)
    dw = w.new_empty(w.shape)
    sum_over_tokens(transposed("dy_t", dy, s), h, dw[:, d_ff - width :])
    if constant is not None:
        dc = (s @ w).index_fill_(0, rows, 0)
    if width < d_ff:
        torch.ops.nspec_native.expand_columns_(dw, rows, width, s, none if constant is None else constant.contiguous())
    elif len(rows) < d_ff:
        others = (index < 0).nonzero().squeeze(1)
        if constant is None:
            dw.index_fill_(1, others, 0)
        else:
            dw.index_copy_(1, others, torch.outer(s, constant.index_select(0, others)))
    return dc, dw, s


def _together(
    dy: Tensor,
    h: Tensor,
    constant: Tensor | None,
    w: Tensor,
    index: Tensor,
    segments: list[tuple[int, int]],
    dh: Tensor,
    has_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """In place, one product for all tasks: fills ``dh``; the gradients of the constant, of ``w`` and of ``b``."""
    torch.mm(dy, w, out=dh)
    own, zero = index >= 0, h.new_zeros(())
    for set_, (start, stop) in zip(own, segments):
        torch.where(set_, dh[start:stop], zero, out=dh[start:stop])
    s, dw = dy.new_empty(w.shape[0] if has_b else 0), w.new_empty(w.shape)
    sum_over_tokens(transposed("dy_t", dy, s), _with_constants(h, constant, index, segments), dw)
    if constant is None:
        return w.new_empty(0), dw, s
    by_task = torch.zeros((len(segments), w.shape[0]), dtype=torch.float32)
    for total, (start, stop) in zip(by_task, segments):
        torch.sum(dy[start:stop], 0, dtype=torch.float32, out=total)
    dc = torch.where(own, torch.zeros(()), by_task @ w.float())
    return (dc.sum(0, keepdim=True) if len(constant) == 1 else dc).to(h.dtype), dw, s
