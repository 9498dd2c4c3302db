"""Plain PyTorch; defines what the operator means, on every device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, task_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x [tokens, d_in]``, ``weight [d_ff, d_in]`` -> ``h [tokens, d_ff]``, ``counts`` int64 ``[tasks, d_ff]``."""
    h = torch.relu(F.linear(x, weight, bias))
    counts = []
    for start, stop in checks.segments(task_offsets, x.shape[0]):
        # Of the rounded output: what a bf16 h holds is what counts. NaN > 0 is False.
        fired = h[start:stop] > 0
        if valid is not None:
            fired = fired[valid[start:stop]]
        counts.append(fired.sum(0))
    return h, torch.stack(counts) if counts else h.new_zeros((0, weight.shape[0]), dtype=torch.int64)


def backward(dh: Tensor, x: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias`` from that of ``h``."""
    dz = torch.ops.aten.threshold_backward(dh, h, 0)
    return dz @ weight, dz.t() @ x, dz.sum(0)
