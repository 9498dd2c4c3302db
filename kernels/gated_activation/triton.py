"""Triton: one pass each way over blocks of elements; the activation in float32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.active import places_of
from ..common.triton_launch import Launcher, Shipped, aligned, cdiv, launching, planned, pointer
from ..common.triton_tasks import DTYPES

_LAUNCH = {"BLOCK": 2048, "num_warps": 4}  # 16 bytes for each thread of the wider wavefronts of AMD too
_ROWS = {"BLOCK": 1024, "num_warps": 4}  # of the columns of a row
_KINDS = ("silu", "gelu", "gelu_tanh", "relu")


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


def supports(gate: Tensor, up: Tensor, kind: str) -> str | None:
    """None, or why these arguments are not taken. Any strides are: what is not contiguous is copied."""
    if gate.dtype not in DTYPES:
        return f"the dtype is {gate.dtype}; it takes float32, bfloat16 and float16"
    if gate.device.type == "cpu" and gate.dtype == torch.bfloat16:
        return "Triton's interpreter rounds bfloat16 in another way"
    for t in (gate, up):
        if t.device != gate.device or t.layout is not torch.strided:
            return f"a tensor is {t.layout} on {t.device}, the first one on {gate.device}"
    return None


@planned
def _plan(device: torch.device, kind: str, forward: bool, *alike: Any) -> Launcher:
    return Launcher(forward_kernel if forward else backward_kernel, {"KIND": kind, **_LAUNCH})


@planned
def _gradients_plan(device: torch.device, kind: str, *alike: Any) -> Launcher:
    return Launcher(gradients_kernel, {"KIND": kind, **_ROWS})


def _launch(kind: str, forward: bool, *tensors: Tensor) -> None:
    first, n = tensors[0], tensors[0].numel()
    if n == 0:
        return
    alike = first.dtype, n % 16 == 0, n == 1, n >= 2**31, aligned(*tensors)
    plan = _plan(first.device, kind, forward, *alike)
    launching(first.device, plan, (cdiv(n, _LAUNCH["BLOCK"]), 1, 1), *tensors, n)


def forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """As the reference."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    _launch(kind, True, gate, up, h)
    return h


def backward(dh: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """As the reference."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    _launch(kind, False, dh, gate, up, dgate, dup)
    return dgate, dup


def gradients(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, index: Tensor, places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    (tokens, width), k = gate.shape, len(index)
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    columns = gate.new_empty((tokens, k)), gate.new_empty((tokens, k))
    if gate.numel() == 0:
        return dgate, dup, *columns
    places = places_of(index[None], width)[0] if places is None else places
    tensors = dh, gate, up, dgate, dup, places, *columns
    alike = gate.dtype, width % 16 == 0, width == 1, aligned(*tensors)
    plan = _gradients_plan(gate.device, kind, *alike)
    launching(gate.device, plan, (tokens, cdiv(width, _ROWS["BLOCK"]), 1), *tensors, width, k)
    return dgate, dup, *columns


def shipped(target: str) -> list[Shipped]:
    """Every kernel and configuration that can be launched on a target."""
    kernels = []
    for dtype in (torch.bfloat16, torch.float32):
        p, name = pointer(dtype), str(dtype).removeprefix("torch.")
        for kind in _KINDS:
            for label, kernel, names in (
                ("forward", forward_kernel, ("gate_ptr", "up_ptr", "h_ptr")),
                ("backward", backward_kernel, ("dh_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")),
            ):
                signature = {**dict.fromkeys(names, p), "elements": "i32"}
                keywords = {"KIND": kind, **_LAUNCH}
                kernels.append(
                    Shipped(f"{label} {kind} {name}", kernel, signature, keywords, tuple(signature), ("stream",))
                )
            pointers = "dh_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr", "columns_gate_ptr", "columns_up_ptr"
            signature = {**dict.fromkeys(pointers, p), "places_ptr": "*i32", "width": "i32", "columns": "i32"}
            divisible = tuple(argument for argument in signature if argument != "columns")
            kernels.append(
                Shipped(f"gradients {kind} {name}", gradients_kernel, signature, {"KIND": kind, **_ROWS}, divisible)
            )
    return kernels
