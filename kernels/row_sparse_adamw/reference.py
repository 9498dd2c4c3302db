"""Plain PyTorch; defines what the operator means, on every device and dtype.

AdamW (Loshchilov and Hutter 2019), in the form of ``torch.optim.AdamW``, over the active rows of each matrix:

    p ← p (1 - lr · weight_decay)
    m ← β1 m + (1 - β1) g              v ← β2 v + (1 - β2) g²
    p ← p - lr / (1 - β1^step) · m / (√v / √(1 - β2^step) + eps)

A parameter may be rows of neurons that lie in a weight W too: then ``W[index] ← p``, or ``W[:, index] ← pᵀ``, in its dtype.

All other rows of p, m and v stay bitwise as they were. ``step`` is one global number: a row that is updated rarely is
corrected for bias as if it had been updated each time, which is what a dense AdamW with masked gradients does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..write_neurons import reference as write_neurons

Write = tuple[Tensor, Tensor, bool]
"""A weight, the neurons in it, int64 ``[rows]``, and whether they are its columns."""


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
    """Updates ``params``, ``exp_avgs`` and ``exp_avg_sqs`` in place, and the weights in ``writes``."""
    for param, grad, exp_avg, exp_avg_sq, rows in zip(params, grads, exp_avgs, exp_avg_sqs, active):
        p, g, m, v = param, grad, exp_avg, exp_avg_sq
        if rows is not None:
            index = rows.nonzero().squeeze(1)
            p, g, m, v = (t.index_select(0, index) for t in (p, g, m, v))
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g.to(m.dtype), 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1 - betas[1])
        denominator = (v.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
        p.addcdiv_(m.to(p.dtype), denominator.to(p.dtype), value=-lr / (1 - betas[0] ** step))
        if rows is not None:
            for whole, part in zip((param, exp_avg, exp_avg_sq), (p, m, v)):
                whole.index_copy_(0, index, part)
    for param, write in zip(params, writes):
        if write is not None:
            weight, index, columns = write
            rows = param.reshape(len(index), weight.shape[0 if columns else 1])
            write_neurons.write([weight], [rows], [index], [columns])
