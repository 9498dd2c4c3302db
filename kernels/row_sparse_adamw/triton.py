"""Row-sparse AdamW as one Triton kernel over all tensors of a call.

A table on the device holds the addresses and sizes of every tensor, and for each program which tensor it works on; both
are kept from call to call, and what has not changed is not uploaded again. Each program takes a block of one tensor,
seen as a row of elements, and reads the active set itself: nothing is gathered, nobody counts the active rows, and the
host waits for nothing. Inactive rows are neither read nor written, only passed over.

The arithmetic is float32 whatever the dtypes of the tensors, each operation rounded by itself (the compiler may not fuse
a product and a sum), division and root correctly rounded, in the order of the formulas of ``reference.py``;
``csrc/row_sparse_adamw.cpp`` has a factor 1 / root where this divides. ``reference.py`` rounds low-precision parameters and
moments after every operation, this kernel once at the end.

There is one launch for each combination of dtypes and alignment among the tensors, so one for ordinary calls. *Aligned*
tensors begin at multiples of 16 bytes, and so do their rows where they have an active set; they are read and written 16
bytes at a time, others element by element.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..common.checks import PLAIN
from ..common.triton_launch import INTERPRETER, Launcher, cdiv, launching, planned, stream_of, target_of
from .kernels import adamw_kernel
from .reference import Write

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_Row = tuple[
    Tensor, Tensor, Tensor, Tensor, "Tensor | None", "Write | None"
]  # param, grad, exp_avg, exp_avg_sq, active
_Launch = tuple[int, Tensor, Tensor, Launcher]  # programs, table, owners, kernel
_FIELDS = 8  # int64 numbers of a tensor in the table: param, grad, exp_avg, exp_avg_sq, active, elements, width, block
_WRITE_FIELDS = 12  # and, of one that is written to a weight: weight, index, its strides between neurons and numbers
_TABLES = 64  # kept tables: gradients come back at a few addresses, in an order that the allocator chooses


def _keywords(
    target: str, dtypes: Sequence[torch.dtype], aligned: bool, written: torch.dtype | None = None
) -> dict[str, Any]:
    """The launch keywords for parameters, gradients and moments of these dtypes, and weights that are written to."""
    elements = 64 if target == INTERPRETER else 2048
    wide = 16 // min(dtype.itemsize for dtype in dtypes) if aligned else 1
    types: dict[str, Any] = dict(zip("PGMV", (_TYPES[dtype] for dtype in dtypes)))
    sizes = {"GROUPS": elements // wide, "WIDE": wide, "FIELDS": _FIELDS if written is None else _WRITE_FIELDS}
    types["W"] = None if written is None else _TYPES[written]
    return {**types, **sizes, "num_warps": 4, "enable_fp_fusion": False}


def supports(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    active: Sequence[Tensor | None],
    writes: Sequence[Write | None] = (),
) -> str | None:
    """Why :func:`row_sparse_adamw_` cannot take these tensors, in one line; None where it can.

    It takes plain tensors on one device, contiguous, each float32, bfloat16 or float16, with ``active`` contiguous bool
    tensors there or None.
    """
    device = params[0].device
    for name, tensors in (("param", params), ("grad", grads), ("exp_avg", exp_avgs), ("exp_avg_sq", exp_avg_sqs)):
        for t in tensors:
            # One expression, because a model has hundreds of parameters and this runs in every step.
            if not (
                type(t) in PLAIN
                and t.device == device
                and t.dtype in _TYPES
                and t.layout is torch.strided
                and t.is_contiguous()
            ):
                return (
                    f"a {name} is a {type(t).__name__}, {t.dtype}, {t.layout}, on {t.device} (the first: {device})"
                    + (f", strides {t.stride()} for shape {list(t.shape)}" if t.layout is torch.strided else "")
                )
    for param, mask in zip(params, active):
        if mask is not None:
            if mask.device != device or mask.dtype != torch.bool or not mask.is_contiguous():
                return f"an active set is {mask.dtype} on {mask.device}, strides {list(mask.stride())}"
            if param.dim() == 0:
                return "a param has an active set but no rows"
    for write in writes:
        if write is not None:
            weight, index, _ = write
            if type(weight) not in PLAIN or weight.dtype not in _TYPES or {weight.device, index.device} != {device}:
                what = f"a weight is a {type(weight).__name__}, {weight.dtype}, on {weight.device}"
                return f"{what}, and its index on {index.device} (the first param: {device})"
    if device.type != "cpu" and target_of(device) == INTERPRETER:
        return "Triton's interpreter cannot follow addresses on a device"
    return None


@functools.lru_cache(maxsize=_TABLES)
def _owners(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 ``[programs]``: which tensor each program works on, for tensors of so many blocks."""
    tensors = torch.arange(len(blocks), dtype=torch.int32)
    return tensors.repeat_interleave(torch.tensor(blocks)).to(device)


def _tables(tensors: Sequence[_Row]) -> list[_Launch]:
    """For each launch: the number of programs, the table, the owners, the kernel."""
    device = tensors[0][0].device
    target = target_of(device)
    launches: dict[tuple[Any, ...], list[tuple[list[int], list[int]]]] = {}
    for param, grad, exp_avg, exp_avg_sq, mask, write in tensors:
        four = (param, grad, exp_avg, exp_avg_sq)
        dtypes = tuple(t.dtype for t in four)
        wide = _keywords(target, dtypes, True)["WIDE"]
        elements = param.numel()
        if elements == 0:
            continue
        width = elements if mask is None else elements // param.shape[0]
        addresses = [t.data_ptr() for t in four]
        aligned = width % wide == 0 and not any(address % 16 for address in addresses)
        row, own = [*addresses, 0 if mask is None else mask.data_ptr(), elements, width], []
        if write is not None:
            weight, index, columns = write
            strides = weight.stride()[::-1] if columns else weight.stride()
            row[-1], own = elements // param.shape[0], [weight.data_ptr(), index.data_ptr(), *strides]
        kind = dtypes, aligned, None if write is None else write[0].dtype
        launches.setdefault(kind, []).append((row, own))
    found = []
    for (dtypes, aligned, written), entries in launches.items():
        rows = [row for row, _ in entries]
        keywords = _keywords(target, dtypes, aligned, written)
        blocks = tuple(cdiv(row[5], keywords["GROUPS"] * keywords["WIDE"]) for row in rows)
        starts = itertools.accumulate((0, *blocks[:-1]))
        numbers = [number for (row, own), start in zip(entries, starts) for number in (*row, start, *own)]
        # From pinned memory the copy waits for nothing.
        table = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
        launcher = _launcher(device, dtypes, aligned, written)
        found.append((sum(blocks), table.to(device, non_blocking=True), _owners(blocks, device), launcher))
    return found


@planned
def _launcher(
    device: torch.device, dtypes: tuple[torch.dtype, ...], aligned: bool, written: torch.dtype | None
) -> Launcher:
    return Launcher(adamw_kernel, _keywords(target_of(device), dtypes, aligned, written))


_kept: OrderedDict[tuple[Any, ...], list[_Launch]] = OrderedDict()
_captured: dict[int, list[_Launch]] = {}  # read by CUDA graphs, which hold addresses and no references


def _place(write: Write | None) -> tuple[Any, ...] | None:
    """All that a table holds of a weight that is written to."""
    if write is None:
        return None
    weight, index, columns = write
    return weight.data_ptr(), weight.dtype, weight.stride(), index.data_ptr(), columns


def _plan(tensors: Sequence[_Row]) -> list[_Launch]:
    """The launches of a call, kept for calls on the same stream with tensors of the same dtypes, shapes and addresses.

    Another stream may not wait for the upload of a table on this one.
    """
    device = tensors[0][0].device
    key = (
        device,
        stream_of(device),
        *(t if t is None else (t.data_ptr(), t.dtype) for row in tensors for t in row[:5]),
        *(row[0].shape for row in tensors),
        *(_place(row[5]) for row in tensors),
    )
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key in _kept:
        _kept.move_to_end(key)
    else:
        if capturing:
            # A graph would upload the table again at each replay, from memory that is long used for something else.
            raise RuntimeError("a CUDA graph is being captured: capture forward and backward pass, and step outside")
        _kept[key] = _tables(tensors)
        if len(_kept) > _TABLES:
            _kept.popitem(last=False)
    if capturing:
        _captured[id(_kept[key])] = _kept[key]
    return _kept[key]


@torch.no_grad()
def row_sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    active: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    writes: Sequence[Write | None] = (),
) -> None:
    """One step of ``torch.optim.AdamW`` on the active rows, in place; the other rows are neither read nor written.

    Args:
        params: float32, bfloat16 or float16, contiguous, any shape ``[rows, ...]``.
        grads: of the same shapes, any of the dtypes. Rows outside ``active`` may hold anything, NaN too.
        exp_avgs: first moments, likewise.
        exp_avg_sqs: second moments, likewise.
        active: for each parameter a bool ``[rows]``, or None: every row.
        step: the number of this step, from 1.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled.
        writes: as of the operator.
    """
    coefficients = (
        1 - lr * weight_decay,
        lr / (1 - betas[0] ** step),
        1 - betas[0],
        betas[1],
        1 - betas[1],
        (1 - betas[1] ** step) ** 0.5,
        eps,
    )
    kept = [None if write is None else (write[0], write[1].contiguous(), write[2]) for write in writes]
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, active, kept or [None] * len(params)))
    for programs, table, owners, launcher in _plan(rows):
        launching(table.device, launcher, (programs, 1, 1), table, owners, *map(float, coefficients))
