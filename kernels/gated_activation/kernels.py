"""The Triton kernels of ``gated_activation``; ``triton.py`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _point(x, KIND: tl.constexpr):
    """The value of the activation, and its slope."""
    if KIND == "silu":
        rest = 1.0 + tl.exp(-x)
        s = 1.0 / rest
        value = x / rest
        slope = s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        square = x * x
        rest = 1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * square * x))
        s = 1.0 / rest
        value = x / rest
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * square)
    else:
        value = tl.where(x <= 0, 0.0, x)  # NaN stays, and lets the gradient through
        slope = tl.where(x <= 0, 0.0, 1.0)
    return value, slope


@triton.jit
def forward_kernel(gate_ptr, up_ptr, h_ptr, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``h = act(gate) up``, the activation rounded before it is multiplied."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < elements
    value, _ = _point(tl.load(gate_ptr + at, mask=there, other=0.0).to(tl.float32), KIND)
    up = tl.load(up_ptr + at, mask=there, other=0.0).to(tl.float32)
    dtype = h_ptr.dtype.element_ty
    tl.store(h_ptr + at, (value.to(dtype).to(tl.float32) * up).to(dtype), mask=there)


@triton.jit
def backward_kernel(dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``dgate = dh up act'(gate)``, ``dup = dh act(gate)`` with the rounded activation."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < elements
    value, slope = _point(tl.load(gate_ptr + at, mask=there, other=0.0).to(tl.float32), KIND)
    up = tl.load(up_ptr + at, mask=there, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + at, mask=there, other=0.0).to(tl.float32)
    dtype = dgate_ptr.dtype.element_ty
    # A slope of zero shuts: what is infinite there does not become NaN.
    tl.store(dgate_ptr + at, tl.where(slope == 0, 0.0, dh * up * slope).to(dtype), mask=there)
    tl.store(dup_ptr + at, (dh * value.to(dtype).to(tl.float32)).to(dtype), mask=there)


@triton.jit(do_not_specialize=["columns"])
def gradients_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    places_ptr,
    columns_gate_ptr,
    columns_up_ptr,
    width,
    columns,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of a part of a row, and those of its columns that have a place, beside one another."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    at = row * width + column
    value, slope = _point(tl.load(gate_ptr + at, mask=there, other=0.0).to(tl.float32), KIND)
    up = tl.load(up_ptr + at, mask=there, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + at, mask=there, other=0.0).to(tl.float32)
    place = tl.load(places_ptr + column, mask=there, other=-1)
    dtype = dgate_ptr.dtype.element_ty
    dgate = tl.where(slope == 0, 0.0, dh * up * slope).to(dtype)
    dup = (dh * value.to(dtype).to(tl.float32)).to(dtype)
    tl.store(dgate_ptr + at, dgate, mask=there)
    tl.store(dup_ptr + at, dup, mask=there)
    # Few of many: each is a store of its own, and no further read.
    tl.store(columns_gate_ptr + row * columns + place, dgate, mask=place >= 0)
    tl.store(columns_up_ptr + row * columns + place, dup, mask=place >= 0)
