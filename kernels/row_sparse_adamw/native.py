"""Row-sparse AdamW on the CPU in C++: one pass over the active rows of all tensors (``kernels/csrc``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import native
from ..common.checks import PLAIN
from .reference import Write


def supports(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    active: Sequence[Tensor | None],
    writes: Sequence[Write | None] = (),
) -> str | None:
    """Why :func:`row_sparse_adamw_` cannot take these tensors, in one line; None where it can.

    It takes plain float32 CPU tensors, all contiguous, with ``active`` contiguous bool CPU tensors or None.
    """
    if not params:
        return "there is no tensor"  # by whose device PyTorch finds the operator
    for name, tensors in (("param", params), ("grad", grads), ("exp_avg", exp_avgs), ("exp_avg_sq", exp_avg_sqs)):
        for t in tensors:
            # One expression, because a model has hundreds of parameters and this runs in every step.
            if not (
                type(t) in PLAIN
                and t.is_cpu
                and t.dtype is torch.float32
                and t.layout is torch.strided
                and t.is_contiguous()
            ):
                return f"a {name} is a {type(t).__name__}, {t.dtype}, {t.layout}, on {t.device}" + (
                    f", strides {t.stride()} for shape {list(t.shape)}" if t.layout is torch.strided else ""
                )
    for mask in active:
        if mask is not None and (mask.device.type != "cpu" or mask.dtype != torch.bool or not mask.is_contiguous()):
            return f"an active set is {mask.dtype} on {mask.device}, strides {list(mask.stride())}"
    return native.refuses_tensors(*[write[0] for write in writes if write is not None])


@torch.no_grad()
def row_sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    active: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    writes: Sequence[Write | None] = (),
) -> None:
    """One step of ``torch.optim.AdamW`` on the active rows, in place; the other rows are neither read nor written.

    The result has the same bits for every number of threads and every x86-64 processor.

    Args:
        params: float32, any shape ``[rows, ...]``.
        grads: like ``params``. Rows outside ``active`` may hold anything, NaN too.
        exp_avgs: first moments, like ``params``.
        exp_avg_sqs: second moments, like ``params``.
        active: for each parameter a bool ``[rows]``, or None: every row.
        step: the number of this step, from 1.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled.
        writes: as of the operator; the weights float32, bfloat16 or float16, of any strides.

    Raises:
        RuntimeError: the library is not there, or the tensors are not what :func:`supports` takes.
    """
    native.require()
    every_row, nothing = torch.empty(0, dtype=torch.bool), torch.empty(0)
    torch.ops.nspec_native.row_sparse_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [every_row if mask is None else mask for mask in active],
        # A row of a weight is a neuron.
        [nothing if write is None else write[0].t() if write[2] else write[0] for write in writes],
        [nothing if write is None else write[1].contiguous() for write in writes],
        step,
        lr,
        *betas,
        eps,
        weight_decay,
    )
    # The dispatcher does not count in-place writes of operators outside PyTorch, and autograd relies on the count.
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])
