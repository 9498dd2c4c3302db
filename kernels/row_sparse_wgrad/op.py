"""The operator ``nspec::row_sparse_wgrad``: the weight gradient of fc1 for the active neurons only."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.active import active_index, rows_of
from ..common.backend import Choice, choose, explainable, opaque, standard, torch_operator

BACKENDS = standard(__package__)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    active = torch.arange(2048, device=device) < 1024
    choice: Any = row_sparse_wgrad(make(1024, 2048), make(1024, 512), active, explain=True)  # type: ignore[call-arg]
    return choice


_row_sparse_wgrad = torch_operator(
    "row_sparse_wgrad",
    "(Tensor dh, Tensor x, Tensor index, Tensor? task_offsets) -> (Tensor, Tensor)",
    lambda *args: choose("row_sparse_wgrad", BACKENDS, *args).forward(*args),
    lambda dh, x, index, task_offsets: (dh.new_empty((dh.shape[1], x.shape[1])), dh.new_empty(dh.shape[1])),
)


@torch.library.custom_op("nspec::row_sparse_wgrad_add_", mutates_args=("total",))
def _row_sparse_wgrad_add(total: Tensor, dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None) -> Tensor:
    args = (dh, x, index, task_offsets)
    return choose("row_sparse_wgrad", BACKENDS, *args).accumulate(total, *args)


@_row_sparse_wgrad_add.register_fake
def _(total: Tensor, dh: Tensor, x: Tensor, index: Tensor, task_offsets: Tensor | None) -> Tensor:
    return dh.new_empty(dh.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dh, x, index, task_offsets = inputs
    ctx.save_for_backward(dh, x, index, task_offsets)


def _gradient(ctx: Any, ddw: Tensor, ddb: Tensor) -> tuple[Tensor | None, ...]:
    """The operator is bilinear: with G = m ⊙ ddw per task, d(dh) = x Gᵀ + ddb and dx = dh G."""
    dh, x, index, task_offsets = ctx.saved_tensors
    d_dh, dx = ddb.expand_as(dh).clone(), torch.zeros_like(x)
    for set_, (start, stop) in zip(index, checks.segments(task_offsets, dh.shape[0])):
        rows = rows_of(set_)
        masked = torch.zeros_like(ddw).index_copy_(0, rows, ddw.index_select(0, rows))
        d_dh[start:stop] += x[start:stop] @ masked.t()
        dx[start:stop] = dh[start:stop] @ masked
    return d_dh, dx, None, None


_row_sparse_wgrad.register_autograd(_gradient, setup_context=_save)


def _prepare(
    dh: Tensor,
    x: Tensor,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
    add_to: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    checks.shape("dh", dh, [None, None])
    checks.shape("x", x, [dh.shape[0], None])
    checks.active_sets(active, dh.shape[1], task_offsets)
    if dh.dtype != x.dtype:
        raise TypeError(f"dh has dtype {dh.dtype} and x {x.dtype}, expected one dtype")
    if index is None:
        index = active_index(active)
    else:
        checks.sets(index, places, active)
    if add_to is not None:
        checks.shape("add_to", add_to, [dh.shape[1], x.shape[1]])
        if add_to.dtype != torch.float32:
            raise TypeError(f"add_to has dtype {add_to.dtype}, expected torch.float32")
        if add_to.requires_grad and add_to.is_leaf and torch.is_grad_enabled():
            raise ValueError("add_to is a leaf that requires a gradient: give a tensor that does not")
    return dh, x, index, task_offsets


@explainable("row_sparse_wgrad", BACKENDS, _prepare, composed=None)
def row_sparse_wgrad(
    dh: Tensor,
    x: Tensor,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
    add_to: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight gradient of a linear layer whose outputs are only partly trained, and its dense bias gradient.

    Args:
        dh: gradient of the layer's output before the activation, ``[tokens, d_ff]``.
        x: the layer's input, ``[tokens, d_in]``, same dtype.
        active: bool ``[d_ff]``; ``[tasks, d_ff]`` with ``task_offsets``.
        task_offsets: int32 or int64 ``[tasks + 1]``, for tokens sorted by task.
        index: ``active_index(active)``, for callers that keep it; computed when None.
        places: ``places_of(index, d_ff)``, likewise; computed where it is needed.
        add_to: float32 ``[d_ff, d_in]``, a gradient to which the new one is added in place, summed in float32; its other
            rows are neither read nor written. Returned as ``dw``. Not differentiable.
        dtype: of the result, in place of that of ``dh``: in float32 sums are not rounded where the backend has them so.

    Returns:
        ``dw [d_ff, d_in]``: the sum over tasks of ``dhᵀ x`` over the rows active for the task, all other rows exactly
        zero and not computed; ``db [d_ff]``: the sum of ``dh`` over tokens for every neuron, since the bias is never
        masked.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: shapes that do not fit, offsets that do not cover the tokens.
        TypeError: ``active`` that is not bool, inputs of different dtypes, ``add_to`` that is not float32.

    Example:
        >>> dw, db = row_sparse_wgrad(torch.ones(3, 2), torch.ones(3, 4), torch.tensor([True, False]))
        >>> dw[:, 0].tolist(), db.tolist()
        ([3.0, 0.0], [3.0, 3.0])
    """
    options = {"task_offsets": task_offsets, "index": index, "places": places, "add_to": add_to}
    args = _prepare(dh, x, active, **options)
    if torch.is_autocast_enabled(dh.device.type):  # which would round what is summed in float32
        with torch.autocast(dh.device.type, enabled=False):
            return _compute(args, places, add_to, dtype)
    return _compute(args, places, add_to, dtype)


def _compute(
    args: tuple[Tensor, Tensor, Tensor, Tensor | None],
    places: Tensor | None,
    add_to: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    dh, x = args[:2]
    # Without a gradient of its own to record, as in a backward pass, the computation needs no operator around it.
    direct = not (torch.is_grad_enabled() and (dh.requires_grad or x.requires_grad)) and not opaque(dh, x, add_to)
    if add_to is None:
        if direct:
            dw, db = choose("row_sparse_wgrad", BACKENDS, *args).forward(*args, places, dtype or dh.dtype)
        else:
            dw, db = _row_sparse_wgrad(*args)
        return (dw, db) if dtype is None else (dw.to(dtype), db.to(dtype))
    if not direct:
        return add_to, _row_sparse_wgrad_add(add_to, *args)
    db = choose("row_sparse_wgrad", BACKENDS, *args).accumulate(add_to, *args, places)
    if not add_to.is_inference():
        torch.autograd.graph.increment_version(add_to)  # kernels write unseen
    return add_to, db
