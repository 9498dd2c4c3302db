"""On the CPU: PyTorch's matrix product, then ReLU and count in one pass over it in C++ (``kernels/csrc``).

A count of its own reads all of h once more, which took 1.3 to 3.5 times as long as the product and ReLU together; ReLU
has to pass over h anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks, native


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, task_offsets: Tensor | None
) -> str | None:
    """Why :func:`forward` does not take these arguments; None where it does: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(x, weight, bias)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, task_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x [tokens, d_in]``, ``weight [d_ff, d_in]`` -> ``h [tokens, d_ff]``, ``counts`` int64 ``[tasks, d_ff]``."""
    h = F.linear(x, weight, bias)
    segments = checks.segments(task_offsets, x.shape[0])
    offsets = torch.tensor([0, *(stop for _, stop in segments)])
    counts = torch.empty((len(segments), weight.shape[0]), dtype=torch.int64)
    everything = torch.empty(0, dtype=torch.bool)
    torch.ops.nspec_native.relu_count_(h, everything if valid is None else valid.contiguous(), offsets, counts)
    return h, counts
