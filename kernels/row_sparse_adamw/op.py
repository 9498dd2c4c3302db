"""The operator ``nspec::row_sparse_adamw_``: AdamW that touches active rows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.backend import Choice, choose, explainable, standard
from .reference import Write

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
    writes: Sequence[Write | None] = (),
    **_: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor | None], list[Write | None]]:
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
    if writes:
        _check_writes(params, active, writes)
    return list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(active), list(writes)


def _check_writes(params: Sequence[Tensor], active: Sequence[Tensor | None], writes: Sequence[Write | None]) -> None:
    if len(writes) != len(params):
        raise ValueError(f"writes has length {len(writes)}, expected that of params, {len(params)}")
    for i, (param, rows, write) in enumerate(zip(params, active, writes)):
        if write is None:
            continue
        weight, index, columns = write
        checks.shape(f"writes[{i}]: the weight", weight, [None, None])
        checks.shape(f"writes[{i}]: the index", index, [param.shape[0]])
        size = weight.shape[0 if columns else 1]
        if param.numel() != param.shape[0] * size:
            raise ValueError(f"params[{i}] has shape {list(param.shape)}, expected rows of {size} as its weight has")
        if rows is not None:
            raise ValueError(f"params[{i}] has an active set and a weight to be written to, expected one of them")


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
    writes: Sequence[Write | None] = (),
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
        writes: for each parameter None, or where its rows lie beside: a weight ``[n, d]``, the neurons in it, int64
            ``[rows]``, no number twice, and whether they are columns, ``[d, n]``. What is new is written there in the same
            launch, rounded to the dtype of the weight, as ``write_neurons_`` would do after it; the weight's version stays.

    With ``explain=True`` it changes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, ``step`` below 1, a parameter with an active set and
            a weight to be written to.
        TypeError: an active set that is not bool.

    Example:
        >>> p, m, v = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
        >>> row_sparse_adamw_([p], [torch.ones(2, 3)], [m], [v], [torch.tensor([True, False])], step=1, lr=0.5)
        >>> p[:, 0].tolist()
        [0.5, 1.0]
    """
    *lists, wanted = _prepare(params, grads, exp_avgs, exp_avg_sqs, active, step=step, writes=writes)
    if not any(write is not None for write in wanted):
        _row_sparse_adamw(*lists, step, lr, *betas, eps, weight_decay)
        return
    backend = choose("row_sparse_adamw", BACKENDS, *lists, wanted)
    options = {"step": step, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    backend.row_sparse_adamw_(*lists, **options, writes=wanted)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])  # kernels write unseen
