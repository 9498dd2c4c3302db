"""The operator ``nspec::row_sparse_wgrad``: the weight gradient of fc1 for the active neurons only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.backend import Backend, choose, never
from . import reference

BACKENDS = (Backend("reference", reference, never),)


def example() -> tuple[Any, ...]:
    """Arguments of an ordinary float32 call on the CPU, for the explanation of the choice of backend."""
    return torch.zeros(4, 16), torch.zeros(4, 8), torch.ones(1, 16, dtype=torch.bool), None


@torch.library.custom_op("nspec::row_sparse_wgrad", mutates_args=())
def _row_sparse_wgrad(dh: Tensor, x: Tensor, active: Tensor, task_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    args = (dh, x, active, task_offsets)
    return choose("row_sparse_wgrad", BACKENDS, *args).implementation.forward(*args)


@_row_sparse_wgrad.register_fake
def _(dh: Tensor, x: Tensor, active: Tensor, task_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    return dh.new_empty((dh.shape[1], x.shape[1])), dh.new_empty(dh.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dh, x, active, task_offsets = inputs
    ctx.offsets = task_offsets
    ctx.save_for_backward(dh, x, active)


def _gradient(ctx: Any, ddw: Tensor, ddb: Tensor) -> tuple[Tensor | None, ...]:
    """The operator is bilinear: with G = m ⊙ ddw per task, d(dh) = x Gᵀ + ddb and dx = dh G."""
    dh, x, active = ctx.saved_tensors
    d_dh, dx = ddb.expand_as(dh).clone(), torch.zeros_like(x)
    for set_, (start, stop) in zip(active, checks.segments(ctx.offsets, dh.shape[0])):
        masked = ddw * set_[:, None]
        d_dh[start:stop] += x[start:stop] @ masked.t()
        dx[start:stop] = dh[start:stop] @ masked
    return d_dh, dx, None, None


_row_sparse_wgrad.register_autograd(_gradient, setup_context=_save)


def row_sparse_wgrad(
    dh: Tensor, x: Tensor, active: Tensor, *, task_offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight gradient of a linear layer whose outputs are only partly trained, and its dense bias gradient.

    Args:
        dh: gradient of the layer's output before the activation, ``[tokens, d_ff]``.
        x: the layer's input, ``[tokens, d_in]``, same dtype.
        active: bool ``[d_ff]``; ``[tasks, d_ff]`` with ``task_offsets``.
        task_offsets: int32 or int64 ``[tasks + 1]``, for tokens sorted by task.

    Returns:
        ``dw [d_ff, d_in]``: the sum over tasks of ``dhᵀ x`` over the rows active for the task, all other rows exactly
        zero and not computed; ``db [d_ff]``: the sum of ``dh`` over tokens for every neuron, since the bias is never
        masked.

    Raises:
        ValueError: shapes that do not fit, offsets that do not cover the tokens.
        TypeError: ``active`` that is not bool, inputs of different dtypes.

    Example:
        >>> dw, db = row_sparse_wgrad(torch.ones(3, 2), torch.ones(3, 4), torch.tensor([True, False]))
        >>> dw[:, 0].tolist(), db.tolist()
        ([3.0, 0.0], [3.0, 3.0])
    """
    checks.shape("dh", dh, [None, None])
    checks.shape("x", x, [dh.shape[0], None])
    checks.active_sets(active, dh.shape[1], task_offsets)
    if dh.dtype != x.dtype:
        raise TypeError(f"dh has dtype {dh.dtype} and x {x.dtype}, expected one dtype")
    return _row_sparse_wgrad(dh, x, active if active.dim() == 2 else active[None], task_offsets)
