"""Plain PyTorch; defines what the operator means, on every device and dtype.

The activation is computed in float32 (float64 in float64) and rounded to the dtype, then multiplied in the dtype, as in
the gated blocks of Hugging Face's models: ``h = act(gate) · up``. With f the activation:

    dgate = dh · up · f'(gate)          dup = dh · f(gate)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(gate: Tensor, kind: str) -> Tensor:
    """The activation alone, rounded to the dtype of ``gate``."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if kind == "silu":
        wide = F.silu(wide)
    elif kind == "relu":
        wide = F.relu(wide)
    else:
        wide = F.gelu(wide, approximate="tanh" if kind == "gelu_tanh" else "none")
    return wide.to(gate.dtype)


def forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``gate`` and ``up`` of one shape; of differentiable operations alone, none of them in place."""
    return activate(gate, kind) * up


def backward(dh: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate`` and ``up``; that of ``gate`` is rounded once."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    wide, outer = gate.to(dtype), dh.to(dtype) * up.to(dtype)
    if kind == "silu":
        dgate = torch.ops.aten.silu_backward(outer, wide)
    elif kind == "relu":
        dgate = torch.ops.aten.threshold_backward(outer, wide, 0)
    else:
        dgate = torch.ops.aten.gelu_backward(outer, wide, approximate="tanh" if kind == "gelu_tanh" else "none")
    return dgate.to(gate.dtype), dh * activate(gate, kind)


def gradients(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, index: Tensor, places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients ``[tokens, d_ff]``, and their columns ``index``, int64 ``[k]``."""
    dgate, dup = backward(dh, gate, up, kind)
    return dgate, dup, dgate.index_select(1, index), dup.index_select(1, index)
