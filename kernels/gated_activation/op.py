"""The operator ``nspec::gated_activation``: the activation of a gated feed-forward block, times its other half."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common import checks, gpu, native
from ..common.backend import Backend, Choice, answer, choose, explainable, opaque, requested
from ..common.derivatives import once, transformed
from . import reference

KINDS = ("silu", "gelu", "gelu_tanh", "relu")

BACKENDS = (
    Backend("triton", f"{__package__}.triton", gpu.why_not),
    Backend("native", f"{__package__}.native", native.why_not),
    Backend("reference", f"{__package__}.reference"),
)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    choice: Any = gated_activation(make(1024, 1024), make(1024, 1024), "silu", explain=True)  # type: ignore[call-arg]
    return choice


@torch.library.custom_op("nspec::gated_activation", mutates_args=())
def _gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return choose("gated_activation", BACKENDS, gate, up, kind).forward(gate, up, kind)


@_gated_activation.register_fake
def _(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("nspec::gated_activation_backward", mutates_args=())
def _gated_activation_backward(dh: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return choose("gated_activation", BACKENDS, gate, up, kind).backward(dh, gate, up, kind)


@_gated_activation_backward.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    return *_gated_activation_backward(dh, *ctx.saved_tensors, ctx.kind), None


_gated_activation.register_autograd(_gradient, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same for eager calls: a custom operator costs the host as much as ten launches."""

    @staticmethod
    def forward(ctx: Any, backend: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.backend, ctx.kind = backend, kind
        ctx.save_for_backward(gate, up)
        h: Tensor = backend.forward(gate, up, kind)
        return h

    @staticmethod
    @once
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        dgate, dup = ctx.backend.backward(dh, *ctx.saved_tensors, ctx.kind)
        return None, dgate, dup, None


@explainable
def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """What a gated feed-forward block puts between its layers: ``act(gate) · up``, elementwise (SwiGLU, GeGLU, ReGLU).

    The activation is computed in float32, rounded to the dtype, and multiplied in the dtype, as Hugging Face's models
    do; float64 stays float64. Forward and backward are one pass each, and nothing but gate and up is kept in between.

    Args:
        gate: any shape, any floating dtype.
        up: of that shape and dtype.
        kind: ``"silu"``, ``"gelu"`` (with erf), ``"gelu_tanh"`` or ``"relu"``.

    Returns:
        A tensor of that shape and dtype. Differentiable once in gate and up.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: different shapes, an unknown ``kind``.
        TypeError: different dtypes, or no floating ones.

    Example:
        >>> gated_activation(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 3.0]), "relu").tolist()
        [6.0, 0.0]
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    checks.shape("up", up, list(gate.shape))
    if gate.dtype != up.dtype or not gate.dtype.is_floating_point:
        raise TypeError(f"gate has dtype {gate.dtype} and up {up.dtype}, expected one floating dtype")
    by_torch = requested("gated_activation") == "auto" and not torch.compiler.is_compiling()
    if by_torch and transformed():
        answer("gated_activation", "reference", "torch.func knows the derivatives of PyTorch's operations only")
        return reference.forward(gate, up, kind)
    if opaque(gate, up):
        return _gated_activation(gate, up, kind)
    module = choose("gated_activation", BACKENDS, gate, up, kind)
    h: Tensor = (
        _Eager.apply(module, gate, up, kind)
        if torch.is_grad_enabled() or transformed()
        else module.forward(gate, up, kind)
    )
    return h


def gated_gradients(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, index: Tensor | None, places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`gated_activation`, and some of their columns beside them, for a backward pass.

    Args:
        dh: gradient of the product, ``[tokens, d_ff]``. Its memory may be used for a result.
        gate: ``[tokens, d_ff]``, of that dtype.
        up: the same.
        kind: as there.
        index: int64 ``[k]``, rising: the columns; None: all, which are not copied.
        places: int32 ``[d_ff]``, where each column is in ``index``, -1 for nowhere, for callers that keep it.

    Returns:
        The gradients of gate and up, ``[tokens, d_ff]``, and their columns ``index``, ``[tokens, k]``.

    Raises:
        ValueError: different shapes.
    """
    checks.shape("gate", gate, [None, None])
    checks.shape("up", up, list(gate.shape))
    checks.shape("dh", dh, list(gate.shape))
    module = choose("gated_activation", BACKENDS, gate, up, kind)
    if index is None:
        dgate, dup = module.backward(dh, gate, up, kind)
        return dgate, dup, dgate, dup
    found: tuple[Tensor, Tensor, Tensor, Tensor] = module.gradients(dh, gate, up, kind, index, places)
    return found
