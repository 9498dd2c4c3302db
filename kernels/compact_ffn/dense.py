"""When the whole block is faster than the compact one, and that block: small shapes, and many tasks in a batch on a CPU.

Packing and its calls take a time of their own, twice a step, whatever the shape. Below some work saved, the plain block
with the inactive rows of W1 set to zero is faster; it is exact as well, and 2 to 17 % slower than a dense
one (512 x 256 x 1024: float32 0.93x, bfloat16 0.83x, where the compact block would run at 0.86x and 0.61x at density 0.9).

Several tasks pack once each, for few tokens each. There every product runs once over the tokens of all tasks, and what is
masked is the result: a deselected neuron's value before the ReLU is its bias.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks
from ..common.derivatives import once

# Multiplications of one of the six products that the compact block must save to make up for packing, for one task,
# and the size from which it is faster at every density (its backward needs less memory traffic). From forward +
# backward on two cores with AVX-512 and AMX: at 1024 x 256 x 1024, float32, density 0.78 (5.9e7 saved) 1.06x of dense, at
# 512 x 256 x 1024 (3.0e7) 0.94x; in bfloat16 2048 x 192 x 768 at density 0.5 (1.5e8) 1.08x, at 0.78 (0.7e8) 0.78x.
LEAST_SAVED = {torch.float32: 4e7, torch.bfloat16: 1.4e8, torch.float16: 1.4e8}
LARGE = 2e9

#: With several tasks in the call, tokens of a task times the share of inactive neurons (tokens whose work is saved) from
#: which packing for each task pays. Forward + backward against dense, four and eight tasks, 512 x 2048 and 1024 x 4096:
#: float32 at 256 x 0.5 compact 1.12x, dense 0.99x; at 256 x 0.22 0.82x, 0.99x; bfloat16 at 1024 x 0.5 1.02x, 0.79x;
#: at 512 x 0.5 0.83x, 0.86x; at 256 x 0.22 0.43x, 0.90x.
LEAST_TOKENS = {torch.float32: 128, torch.bfloat16: 400, torch.float16: 400}


#: The same on a GPU, where what costs is the host: a compact block keeps it busy for some 0.15 ms longer than a dense one,
#: forward and backward (``python -m bench.host``), and the device does six products of these multiplications at
#: 600 TFLOP/s in 16 bits, 60 in float32. Arithmetic, NOT YET MEASURED: ``python -m bench.gpu.probe --only E6``.
LEAST_SAVED_ON_GPU = {torch.float32: 1e9, torch.bfloat16: 1e10, torch.float16: 1e10}


def reason(x: Tensor, w1: Tensor, index: Tensor, task_offsets: Tensor | None = None) -> str | None:
    """Why the dense block is faster for these arguments, ``x [..., d_in]``; None where it is not."""
    tasks, width = index.shape
    whole = x.numel() * w1.shape[0]
    saved = whole - x.numel() * width
    if x.device.type == "cuda":
        least = LEAST_SAVED_ON_GPU.get(x.dtype)
        # Captured or not, so that a graph computes what was run before it: NSPEC_BACKEND=triton is for small blocks in one.
        if least is None or tasks > 1 or task_offsets is not None or saved >= least:
            return None
        return (
            f"its launches cost the host more than the {saved:.1e} multiplications that it saves (at least {least:.1e})"
        )
    least = LEAST_SAVED.get(x.dtype)
    if x.device.type != "cpu" or least is None:
        return None
    if tasks > 1:
        tokens = saved / (max(w1.numel(), 1) * tasks)
        if tokens >= LEAST_TOKENS[x.dtype]:
            return None
        return (
            f"with several tasks, packing for each costs more than the work of {tokens:.0f} tokens that it saves a task "
            f"(at least {LEAST_TOKENS[x.dtype]})"
        )
    if saved >= least or whole >= LARGE:
        return None
    return f"packing would cost more than the {saved:.1e} multiplications that it saves (at least {least:.1e})"


def block(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, active: Tensor, task_offsets: Tensor | None
) -> Tensor:
    """``x [tokens, d_in]`` -> ``[tokens, d_out]``; ``active`` bool ``[d_ff]`` or ``[tasks, d_ff]`` with offsets.

    For several tasks, a NaN in a row of W1 that some of them use reaches the gradient of x at the tokens of all.
    """
    if task_offsets is not None:
        lengths = [stop - start for start, stop in checks.segments(task_offsets, x.shape[0])]
        return torch.as_tensor(_Several.apply(x, w1, b1, w2, b2, active, lengths))
    if active.device.type != "cpu" or not bool(active.all()):  # elsewhere, to look would wait for the device
        w1 = w1.masked_fill(~active[:, None], 0)  # and not a product: what is masked may be NaN
    return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)


def composed(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, active: Tensor, task_offsets: Tensor | None
) -> Tensor:
    """As :func:`block`, from operations of PyTorch alone, which ``torch.func`` can take derivatives of any kind of."""
    if task_offsets is None:
        h = F.linear(x, torch.where(active[:, None], w1, torch.zeros_like(w1)), b1)
    else:
        lengths = [stop - start for start, stop in checks.segments(task_offsets, x.shape[0])]
        own = torch.cat([row.expand(length, -1) for row, length in zip(active, lengths)])
        h = F.linear(x, w1)
        h = torch.where(own, h, torch.zeros_like(h))
        h = h if b1 is None else h + b1
    return F.linear(F.relu(h), w2, b2)


class _Several(torch.autograd.Function):
    """The block of several tasks: ``h = relu(m x W1ᵀ + b1)`` with m the set of the token's task, ``y = h W2ᵀ + b2``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        active: Tensor,
        lengths: list[int],
    ) -> Tensor:
        h = F.linear(x, w1, b1)
        constant = h.new_zeros(()) if b1 is None else b1
        for part, own in zip(h.split(lengths), active):
            torch.where(own, part, constant, out=part)
        h.relu_()
        ctx.save_for_backward(x, w1, w2, h, active)
        ctx.lengths = lengths
        return F.linear(h, w2, b2)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, h, active = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w2, need_b2, *_ = ctx.needs_input_grad
        dh = dy @ w2
        torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        db1 = dh.sum(0) if need_b1 else None  # masked or not, the bias is in every value
        for part, own in zip(dh.split(ctx.lengths), active):
            part.masked_fill_(~own, 0)
        return (
            dh @ w1 if need_x else None,
            dh.t() @ x if need_w1 else None,
            db1,
            dy.t() @ h if need_w2 else None,
            dy.sum(0) if need_b2 else None,
            None,
            None,
        )
