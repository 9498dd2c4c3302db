"""The operator ``nspec::row_sparse_adamw_``: AdamW that touches active rows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.backend import Choice, choose, explainable, standard

BACKENDS = standard(__package__)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes; parameters and moments are in ``dtype``."""
    one = [torch.empty(2048, 512, device=device, dtype=dtype)]
    active = [torch.ones(2048, device=device, dtype=torch.bool)]
    choice: Any = row_sparse_adamw_(one, one, one, one, active, step=1, lr=0.1, explain=True)  # type: ignore[call-arg]
    return choice


@torch.library.custom_op("nspec::row_sparse_adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def _row_sparse_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    active: Sequence[Tensor | None],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    backend = choose("row_sparse_adamw", BACKENDS, params, grads, exp_avgs, exp_avg_sqs, active)
    backend.row_sparse_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        active,
        step=step,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
    )


@_row_sparse_adamw.register_fake
def _(*_: Any) -> None:
    return None


def _prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    active: Sequence[Tensor | None],
    *,
    step: int,
    **_: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
    lengths = [len(params), len(grads), len(exp_avgs), len(exp_avg_sqs), len(active)]
    if len(set(lengths)) > 1:
        raise ValueError(f"params, grads, exp_avgs, exp_avg_sqs and active have lengths {lengths}, expected one length")
    if step < 1:
        raise ValueError(f"step is {step}, expected a count from 1")
    for i, (param, *others, rows) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, active)):
        for name, tensor in zip(("grads", "exp_avgs", "exp_avg_sqs"), others):
            checks.shape(f"{name}[{i}]", tensor, param.shape)
        if rows is not None:
            checks.boolean(f"active[{i}]", rows)
            checks.shape(f"active[{i}]", rows, param.shape[:1])
    return list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(active)


@explainable("row_sparse_adamw", BACKENDS, _prepare, composed=None)
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
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step over the active rows of many matrices, in place.

    Args:
        params: parameters, each ``[rows, ...]``; changed.
        grads: their gradients, same shapes; inactive rows are not read.
        exp_avgs: first moments, same shapes; changed.
        exp_avg_sqs: second moments, same shapes; changed.
        active: for each parameter, bool ``[rows]``, or None for all rows. Inactive rows of the parameter and of both
            moments stay bitwise as they were: no momentum, no decay.
        step: number of this update, from 1, the same for all rows (see ``reference.py`` for what that means).
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator, after bias correction.
        weight_decay: decoupled weight decay.

    With ``explain=True`` it changes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, ``step`` below 1.
        TypeError: an active set that is not bool.

    Example:
        >>> p, m, v = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
        >>> row_sparse_adamw_([p], [torch.ones(2, 3)], [m], [v], [torch.tensor([True, False])], step=1, lr=0.5)
        >>> p[:, 0].tolist()
        [0.5, 1.0]
    """
    lists = _prepare(params, grads, exp_avgs, exp_avg_sqs, active, step=step)
    _row_sparse_adamw(*lists, step, lr, *betas, eps, weight_decay)
