"""Triton: one pass each way over blocks of elements; the activation in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.active import places_of
from ..common.triton_launch import Launcher, aligned, cdiv, launching, padded, planned
from ..common.triton_tasks import DTYPES
from .kernels import backward_kernel, forward_kernel, gradients_kernel

_LAUNCH = {"BLOCK": 2048, "num_warps": 4}  # 16 bytes for each thread of the wider wavefronts of AMD too
_ROWS = {"BLOCK": 1024, "num_warps": 4}  # of the columns of a row


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
    # Rows of whole 16 bytes, as the product after it reads them.
    wide = tokens, padded(k, gate.dtype)
    columns = gate.new_empty(wide)[:, :k], gate.new_empty(wide)[:, :k]
    if gate.numel() == 0:
        return dgate, dup, *columns
    places = places_of(index[None], width)[0] if places is None else places
    tensors = dh, gate, up, dgate, dup, places, *columns
    alike = gate.dtype, width % 16 == 0, width == 1, aligned(*tensors)
    plan = _gradients_plan(gate.device, kind, *alike)
    launching(gate.device, plan, (tokens, cdiv(width, _ROWS["BLOCK"]), 1), *tensors, width, padded(k, gate.dtype))
    return dgate, dup, *columns
