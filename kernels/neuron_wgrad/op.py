"""The operator ``neuron_wgrad``: the weight gradient of some neurons of a linear layer, and of nothing else, compact."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.backend import Choice, choose, explainable, standard

BACKENDS = standard(__package__)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    index = torch.arange(61, device=device)
    asked: Any = neuron_wgrad
    choice: Choice = asked(make(1024, 2048), make(1024, 512), index, dtype=torch.float32, explain=True)
    return choice


_Args = tuple[Tensor, Tensor, Tensor | None, torch.dtype, Tensor | None]


def _prepare(
    dz: Tensor,
    x: Tensor,
    index: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    add_to: Tensor | None = None,
) -> _Args:
    checks.shape("dz", dz, [None, None])
    checks.shape("x", x, [dz.shape[0], None])
    if index is not None:
        checks.numbers("index", index, dz.shape[1])
        index = index.contiguous()
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, expected a floating dtype")
    if x.dtype != dz.dtype:  # a layer that autocast has cast to 16 bits for
        x = x.to(dz.dtype)
    if add_to is None:
        return dz, x, index, dz.dtype if dtype is None else dtype, None
    checks.shape("add_to", add_to, [dz.shape[1] if index is None else index.shape[0], x.shape[1]])
    if not add_to.is_floating_point() or dtype not in (None, add_to.dtype):
        raise TypeError(f"add_to has dtype {add_to.dtype}, expected {dtype or 'a floating dtype'}")
    if add_to.requires_grad and add_to.is_leaf and torch.is_grad_enabled():
        raise ValueError("add_to is a leaf that requires a gradient: give a tensor that does not")
    return dz, x, index, add_to.dtype, add_to


@explainable("neuron_wgrad", BACKENDS, _prepare, composed=None)
def neuron_wgrad(
    dz: Tensor,
    x: Tensor,
    index: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Weight gradient of the neurons ``index`` of a linear layer, and of no other: ``dz[:, index]ᵀ x``.

    Of a last layer, whose neurons are its inputs, it is called with what these were and the gradient of the output, and
    gives the gradient of the columns transposed.

    Args:
        dz: gradient of the layer's output, ``[tokens, n]``.
        x: the layer's input, ``[tokens, d]``, same dtype.
        index: int64 ``[k]``, k from 0 on, rising; None: all columns of dz, where they have been taken out before. On a
            GPU a number that is no column's gives NaN.
        dtype: of the result, in place of that of ``dz``; sums are in float32 anyway (float64 in float64).
        add_to: ``[k, d]``, a gradient of any floating dtype to which the new one is added in place, and which is returned:
            without a tensor of that size in between, and without a pass of its own over both.

    Returns:
        ``[k, d]``, in the order of ``index``, the same bits every time. Not differentiable: it is for backward passes.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: shapes that do not fit, an index on the CPU that holds other numbers than those of columns, ``add_to``
            that is a leaf whose gradient is recorded.
        TypeError: an index that is not int64 ``[k]``, no floating dtype, ``add_to`` of another one than ``dtype``.

    Example:
        >>> neuron_wgrad(torch.tensor([[1.0, 2.0]]), torch.ones(1, 3), torch.tensor([1])).tolist()
        [[2.0, 2.0, 2.0]]
    """
    args = _prepare(dz, x, index, dtype=dtype, add_to=add_to)
    if torch.is_autocast_enabled(dz.device.type):  # which would round what is summed in float32
        with torch.autocast(dz.device.type, enabled=False):
            return _compute(*args)
    return _compute(*args)


@torch.no_grad()
def _compute(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype, add_to: Tensor | None) -> Tensor:
    backend = choose("neuron_wgrad", BACKENDS, dz, x, index, dtype, add_to)
    if add_to is None:
        dw: Tensor = backend.forward(dz, x, index, dtype)
        return dw
    backend.accumulate(add_to, dz, x, index)
    if not add_to.is_inference():
        torch.autograd.graph.increment_version(add_to)  # kernels write unseen
    return add_to
