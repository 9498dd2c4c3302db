"""The operator ``nspec::linear_relu_count``: fc1, ReLU and the activation count of each neuron."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.autocast import cast_inputs
from ..common.backend import Choice, by_torch, choose, explainable, opaque, standard, torch_operator
from ..common.derivatives import once
from . import reference

BACKENDS = standard(__package__)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    choice: Any = linear_relu_count(make(1024, 512), make(2048, 512), make(2048), explain=True)  # type: ignore[call-arg]
    return choice


_linear_relu_count = torch_operator(
    "linear_relu_count",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? valid, Tensor? task_offsets) -> (Tensor, Tensor)",
    lambda *args: choose("linear_relu_count", BACKENDS, *args).forward(*args),
    lambda x, weight, bias, valid, task_offsets: (
        x.new_empty((x.shape[0], weight.shape[0])),
        x.new_empty((1 if task_offsets is None else task_offsets.shape[0] - 1, weight.shape[0]), dtype=torch.int64),
    ),
)
_backward = torch_operator(
    "linear_relu_count_backward",
    "(Tensor dh, Tensor x, Tensor weight, Tensor h) -> (Tensor, Tensor, Tensor)",
    reference.backward,
    lambda dh, x, weight, h: (
        (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]))
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nobody reads one of the counts


def _gradient(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dh is None:
        return (None,) * 5
    dx, dw, db = _backward(dh, *ctx.saved_tensors)
    return dx, dw, db if ctx.has_bias else None, None, None


_linear_relu_count.register_autograd(_gradient, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same for eager calls: a custom operator costs the host as much as several launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, task_offsets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        args = (x, weight, bias, valid, task_offsets)
        output: tuple[Tensor, Tensor] = choose("linear_relu_count", BACKENDS, *args).forward(*args)
        _save(ctx, args, output)
        return output

    @staticmethod
    @once
    def backward(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dh is None:
            return (None,) * 5
        dx, dw, db = reference.backward(dh, *ctx.saved_tensors)
        return dx, dw, db if ctx.has_bias else None, None, None


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    task_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [d_ff, d_in]")
    checks.shape("x", x, [*x.shape[:-1], weight.shape[1]])
    if bias is not None:
        checks.shape("bias", bias, [weight.shape[0]])
    if valid is not None:
        checks.boolean("valid", valid)
        checks.shape("valid", valid, x.shape[:-1])
    if task_offsets is not None:
        checks.offsets(task_offsets)
    x, weight, bias = cast_inputs(x, weight, bias)
    return x.reshape(-1, x.shape[-1]), weight, bias, None if valid is None else valid.reshape(-1), task_offsets


@explainable("linear_relu_count", BACKENDS, _prepare)
def linear_relu_count(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    task_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """First layer of a feed-forward block, and how often each of its neurons fired.

    Args:
        x: ``[..., d_in]``, any floating dtype.
        weight: ``[d_ff, d_in]``.
        bias: ``[d_ff]`` or None.
        valid: bool ``[...]`` (the leading shape of ``x``); tokens with False are computed but not counted. None: all.
        task_offsets: int32 or int64 ``[tasks + 1]``, for tokens sorted by task: those of task t are
            ``offsets[t]:offsets[t + 1]`` of the flattened leading dimensions.

    Returns:
        ``h = relu(x Wᵀ + b)`` ``[..., d_ff]``, and int64 ``[d_ff]`` (``[tasks, d_ff]`` with ``task_offsets``): the number
        of valid tokens with ``h > 0``, taken of the rounded output, exactly. Differentiable in x, weight and bias.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: shapes that do not fit, offsets that do not cover the tokens.
        TypeError: ``valid`` that is not bool, offsets that are not integers.

    Example:
        >>> h, counts = linear_relu_count(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [2.0]]))
        >>> counts.tolist()
        [1, 1]
    """
    args = _prepare(x, weight, bias, valid=valid, task_offsets=task_offsets)
    if by_torch("linear_relu_count"):
        h, counts = reference.forward(*args)
    else:
        h, counts = (_linear_relu_count if opaque(*args[:3]) else _Eager.apply)(*args)
    return h.view(*x.shape[:-1], weight.shape[0]), counts[0] if task_offsets is None else counts
