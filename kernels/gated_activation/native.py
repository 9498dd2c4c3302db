"""On the CPU, one pass in C++ (``kernels/csrc/gated_activation.cpp``), vectorised, with an exponential of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import native


def supports(gate: Tensor, up: Tensor, kind: str) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(gate, up)


def forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """As the reference."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    torch.ops.nspec_native.gated_activation(gate, up, kind, h)
    return h


def backward(dh: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """As the reference."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    torch.ops.nspec_native.gated_activation_backward(dh, gate, up, kind, dgate, dup)
    return dgate, dup


def gradients(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, index: Tensor, places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference, in one pass; the gradient of gate lies in the memory of ``dh`` where that is contiguous."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dup = torch.empty_like(gate)
    columns = [gate.new_empty((len(gate), len(index))) for _ in range(2)]
    torch.ops.nspec_native.gated_gradients(dh, gate, up, kind, index, dh, dup, *columns)
    return dh, dup, columns[0], columns[1]
