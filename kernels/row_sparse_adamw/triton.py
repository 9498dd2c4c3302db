"""Row-sparse AdamW as one Triton kernel over all tensors of a call.

A table on the device holds the addresses and sizes of every tensor, and for each program which tensor it works on; both
are kept from call to call, and what has not changed is not uploaded again. Each program takes a block of one tensor,
seen as a row of elements, and reads the active set itself: nothing is gathered, nobody counts the active rows, and the
host waits for nothing. Inactive rows are neither read nor written, only passed over.

The arithmetic is float32 whatever the dtypes of the tensors, each operation rounded by itself (the compiler may not fuse
a product and a sum), division and root correctly rounded: for float32 tensors the same operations in the same order as
``csrc/row_sparse_adamw.cpp``. ``reference.py`` rounds low-precision parameters and moments after every operation, this
kernel once at the end.

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
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_launch import INTERPRETER, Shipped, launch, target_of

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass (DTensor, FakeTensor, ...) has its own idea of where its data is
_FIELDS = 8  # int64 numbers of a tensor in the table: param, grad, exp_avg, exp_avg_sq, active, elements, width, block
_TABLES = 64  # kept tables: gradients come back at a few addresses, in an order that the allocator chooses


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    table,
    owner,
    decay,
    step_size,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    root_correction2,
    eps,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One block of GROUPS x WIDE elements. WIDE neighbours are in one row, and with WIDE > 1 they are read together."""
    this = tl.load(owner + tl.program_id(0))
    entry = table + this * FIELDS
    p = tl.load(entry + 0).to(tl.pointer_type(P))
    g = tl.load(entry + 1).to(tl.pointer_type(G))
    m = tl.load(entry + 2).to(tl.pointer_type(M))
    v = tl.load(entry + 3).to(tl.pointer_type(V))
    active = tl.load(entry + 4).to(tl.pointer_type(tl.uint8))
    elements = tl.load(entry + 5)
    width = tl.load(entry + 6)
    if WIDE > 1:
        p = tl.multiple_of(p, 16)
        g = tl.multiple_of(g, 16)
        m = tl.multiple_of(m, 16)
        v = tl.multiple_of(v, 16)
    begin = (tl.program_id(0) - tl.load(entry + 7)) * (GROUPS * WIDE)
    group = tl.arange(0, GROUPS) * WIDE
    keep = begin + group < elements
    if active.to(tl.int64) != 0:
        # Rows are counted in 64 bits once for the block, then within it in 32.
        row = begin // width
        inside = (begin - row * width).to(tl.int32) + group
        narrow = tl.minimum(width, 2**30).to(tl.int32)
        keep &= tl.load(active + row + inside // narrow, mask=keep, other=0) != 0
    at = begin + (group[:, None] + tl.arange(0, WIDE)[None, :])
    keep = tl.broadcast_to(keep[:, None], (GROUPS, WIDE))
    grad = tl.load(g + at, mask=keep, other=0.0).to(tl.float32)
    mean = tl.load(m + at, mask=keep, other=0.0).to(tl.float32)
    square = tl.load(v + at, mask=keep, other=0.0).to(tl.float32)
    value = tl.load(p + at, mask=keep, other=0.0).to(tl.float32)
    mean = mean + one_minus_beta1 * (grad - mean)
    square = beta2 * square + one_minus_beta2 * grad * grad
    root = tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + root_correction2) + eps
    value = value * decay - step_size * tl.div_rn(mean, root)
    tl.store(m + at, mean.to(M), mask=keep)
    tl.store(v + at, square.to(V), mask=keep)
    tl.store(p + at, value.to(P), mask=keep)
