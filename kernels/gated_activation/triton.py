"""Triton: one pass each way over blocks of elements; the activation in float32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_launch import Launcher, Shipped, aligned, cdiv, launching, planned, pointer
from ..common.triton_tasks import DTYPES

_LAUNCH = {"BLOCK": 2048, "num_warps": 4}  # 16 bytes for each thread of the wider wavefronts of AMD too
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
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    dgate, dup = backward(dh, gate, up, kind)
    return dgate, dup, dgate.index_select(1, index), dup.index_select(1, index)


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
    return kernels
