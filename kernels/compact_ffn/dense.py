"""When the whole block is faster than the compact one, and that block: small shapes on a CPU.

Packing and its calls take a time of their own, twice a step, whatever the shape. Below some work saved, the plain block
with the inactive rows of W1 set to zero is faster; it is exact as well, and 2 to 17 % slower than a dense
one (512 x 256 x 1024: float32 0.93x, bfloat16 0.83x, where the compact block would run at 0.86x and 0.61x at density 0.9).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks

# Multiplications of one of the six products that the compact block must save to make up for packing, for each task of the
# call, and the size from which it is faster at every density (its backward needs less memory traffic). From forward +
# backward on two cores with AVX-512 and AMX: at 1024 x 256 x 1024, float32, density 0.78 (5.9e7 saved) 1.06x of dense, at
# 512 x 256 x 1024 (3.0e7) 0.94x; in bfloat16 2048 x 192 x 768 at density 0.5 (1.5e8) 1.08x, at 0.78 (0.7e8) 0.78x.
LEAST_SAVED = {torch.float32: 4e7, torch.bfloat16: 1.4e8, torch.float16: 1.4e8}
LARGE = 2e9


def reason(x: Tensor, w1: Tensor, index: Tensor) -> str | None:
    """Why the dense block is faster for these arguments, ``x [..., d_in]``; None where it is not."""
    least = LEAST_SAVED.get(x.dtype)
    if x.device.type != "cpu" or least is None:
        return None
    whole = x.numel() * w1.shape[0]
    saved = whole - x.numel() * index.shape[1]
    if saved >= least * index.shape[0] or whole >= LARGE:
        return None
    return (
        f"packing would cost more than the {saved:.1e} multiplications that it saves (at least {least:.0e} for a task)"
    )


def block(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, active: Tensor, task_offsets: Tensor | None
) -> Tensor:
    """``x [tokens, d_in]`` -> ``[tokens, d_out]`` in plain PyTorch; ``active`` bool ``[d_ff]`` or ``[tasks, d_ff]``."""
    if task_offsets is None:
        if not bool(active.all()):
            w1 = w1.masked_fill(~active[:, None], 0)  # and not a product: what is masked may be NaN
        return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
    parts = [
        block(x[start:stop], w1, b1, w2, b2, set_, None)
        for set_, (start, stop) in zip(active, checks.segments(task_offsets, x.shape[0]))
    ]
    return torch.cat(parts) if parts else x.new_zeros((0, w2.shape[0]))
