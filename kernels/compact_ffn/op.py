"""The operator ``nspec::compact_ffn``: the feed-forward block over the active neurons, with the exact correction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.active import active_index
from ..common.autocast import compute_dtype
from ..common.backend import (
    PREFERRED,
    TORCH_FUNC,
    Backend,
    Choice,
    choose,
    explainable,
    opaque,
    requested,
    standard,
    torch_operator,
    watched,
)
from ..common.derivatives import batched, once, transformed
from . import dense

BACKENDS = standard(__package__, casts=True)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    active = torch.arange(2048, device=device) < 1024
    weights = make(2048, 512), make(2048), make(512, 2048), make(512)
    choice: Any = compact_ffn(make(1024, 512), *weights, active, explain=True)  # type: ignore[call-arg]
    return choice


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    y, kept = choose("compact_ffn", BACKENDS, *args).forward(*args)
    return y, kept[0]


def _backward(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    backend = choose("compact_ffn", BACKENDS, x, w1, b1, w2, None, *rest[:2])
    dx, dw1, db1, dw2, db2 = backend.backward(dy, x, w1, b1, w2, *rest)
    return dx, dw1, w1.new_zeros(len(w1)) if db1 is None else db1, dw2, db2


_compact_ffn = torch_operator(
    "compact_ffn",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor index, Tensor? task_offsets) -> (Tensor, Tensor)",
    _forward,
    lambda x, w1, b1, w2, b2, index, task_offsets: (
        (x.new_empty((x.shape[0], w2.shape[0])), x.new_empty((x.shape[0], index.shape[1])))
    ),
)
_compact_ffn_backward = torch_operator(
    "compact_ffn_backward",
    "(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor index, Tensor? task_offsets, Tensor h)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, w1, b1, w2, index, task_offsets, h: (
        x.new_empty(x.shape),
        *(part for w in (w1, w2) for part in (w.new_empty(w.shape), w.new_empty(w.shape[:1]))),
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, index, task_offsets = inputs
    ctx.biases = (b1 is not None, b2 is not None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else every backward pass would fill a gradient of the size of h with zeros
    ctx.save_for_backward(x, w1, b1, w2, index, task_offsets, output[1])


def _gradient(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, w1, b1, w2, index, task_offsets, h = ctx.saved_tensors
    dx, dw1, db1, dw2, db2 = _compact_ffn_backward(dy, x, w1, b1, w2, index, task_offsets, h)
    has_b1, has_b2 = ctx.biases
    return dx, dw1, db1 if has_b1 else None, dw2, db2 if has_b2 else None, None, None


_compact_ffn.register_autograd(_gradient, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same for eager calls: a custom operator costs the host as much as ten launches, and its output is h alone.

    What the backend keeps from its forward pass, packed weights too, its backward pass has again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        index: Tensor,
        task_offsets: Tensor | None,
        places: Tensor | None,
    ) -> Tensor:
        y, kept = backend.forward(x, w1, b1, w2, b2, index, task_offsets, places)
        ctx.backend, ctx.biases = backend, (b1 is not None, b2 is not None)
        ctx.save_for_backward(x, w1, b1, w2, index, task_offsets, *kept)
        output: Tensor = y
        return output

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if batched(dy):  # an operator of PyTorch's can be taken apart
            dx, dw1, db1, dw2, db2 = _compact_ffn_backward(dy, *ctx.saved_tensors[:7])
        else:
            dx, dw1, db1, dw2, db2 = ctx.backend.backward(dy, *ctx.saved_tensors)
        has_b1, has_b2 = ctx.biases
        return None, dx, dw1, db1 if has_b1 else None, dw2, db2 if has_b2 else None, None, None, None


def _checked(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    active: Tensor,
    task_offsets: Tensor | None,
    index: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    """Checks the arguments; gives the index."""
    if w1.dim() != 2:
        raise ValueError(f"w1 has shape {list(w1.shape)}, expected [d_ff, d_in]")
    d_ff, d_in = w1.shape
    checks.shape("x", x, [*x.shape[:-1], d_in])
    checks.shape("w2", w2, [None, d_ff])
    if b1 is not None and b1.shape != (d_ff,):
        checks.shape("b1", b1, [d_ff])
    if b2 is not None and b2.shape != w2.shape[:1]:
        checks.shape("b2", b2, [w2.shape[0]])
    checks.active_sets(active, d_ff, task_offsets)
    if index is None:
        index = active_index(active)
    else:
        checks.sets(index, places, active)
    return index


def _prepare(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
) -> Any:
    """The arguments of a backend, or the choice where that is another."""
    index, weights = _checked(x, w1, b1, w2, b2, active, task_offsets, index, places), (w1, b1, w2, b2)
    dtype = compute_dtype(x, *weights)
    x = x.reshape(-1, w1.shape[1]).to(dtype)
    if (found := _without_backend(x, w1, index, task_offsets)) is not None:
        return Choice("compact_ffn", "dense", found[1])
    if not opaque(x, *weights) and (backend := _casting(x, weights, index, task_offsets)) is not None:
        return Choice("compact_ffn", backend.name, PREFERRED)
    return x, *_cast(weights, dtype), index, task_offsets


@explainable("compact_ffn", BACKENDS, _prepare, composed=None)
def compact_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Feed-forward block with ReLU in which only the active neurons are computed.

    Equals ``relu(x (m ⊙ w1)ᵀ + b1) w2ᵀ + b2`` with m the active set, in value and in every gradient: the inactive
    neurons' outputs are the constants relu(b1), which enter as a rank-one correction (Tan et al. 2024 mask the rows of
    fc1.weight and nothing else). Every matrix product shrinks with the share of active neurons.

    Args:
        x: ``[..., d_in]``, any floating dtype.
        w1: fc1.weight, ``[d_ff, d_in]``.
        b1: fc1.bias, ``[d_ff]`` or None.
        w2: fc2.weight, ``[d_out, d_ff]``.
        b2: fc2.bias, ``[d_out]`` or None.
        active: bool ``[d_ff]``; ``[tasks, d_ff]`` with ``task_offsets``.
        task_offsets: int32 or int64 ``[tasks + 1]``, for tokens sorted by task: those of task t are
            ``offsets[t]:offsets[t + 1]`` of the flattened leading dimensions.
        index: ``active_index(active)``, for callers that keep it; computed when None.
        places: ``places_of(index, d_ff)``, likewise; computed where it is needed.

    Returns:
        ``[..., d_out]``. Differentiable once in x and in the weights and biases; inactive rows of the gradient of ``w1``
        are exactly zero.

    Small blocks on a CPU are computed dense where that is faster (``dense.py``), unless ``NSPEC_BACKEND`` names a backend
    or the call is compiled. With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for
    these arguments.

    Raises:
        ValueError: shapes that do not fit, offsets that do not cover the tokens.
        TypeError: ``active`` that is not bool, inputs of different dtypes outside autocast.

    Example:
        >>> one, two = torch.ones(1, 1), torch.ones(2, 1)
        >>> compact_ffn(one, two, torch.ones(2), two.t(), None, torch.tensor([True, False])).item()  # relu(2) + relu(1)
        3.0
    """
    weights, d_in = (w1, b1, w2, b2), w1.shape[-1]
    index = _checked(x, *weights, active, task_offsets, index, places)
    if x.dim() == 2:
        return _compute(x, weights, active, index, places, task_offsets)
    y = _compute(x.reshape(-1, d_in), weights, active, index, places, task_offsets)
    return y.view(*x.shape[:-1], w2.shape[0])


def _compute(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    active: Tensor,
    index: Tensor,
    places: Tensor | None,
    task_offsets: Tensor | None,
) -> Tensor:
    """The block for ``x [tokens, d_in]`` in the way that suits the call; ``weights`` are w1, b1, w2, b2."""
    # Before dtypes are made alike.
    dtype, whole = compute_dtype(x, *weights), opaque(x, *weights)
    x = x if x.dtype == dtype else x.to(dtype)
    if (found := _without_backend(x, weights[0], index, task_offsets)) is not None:
        y: Tensor = found[0](x, *_cast(weights, dtype), active, task_offsets)
        return y
    if whole:
        y, _ = _compact_ffn(x, *_cast(weights, dtype), index, task_offsets)
        return y
    args = (index, task_offsets)
    backend = _casting(x, weights, *args)
    if backend is None:
        weights = _cast(weights, dtype)
    module = choose("compact_ffn", BACKENDS, x, *weights, *args) if backend is None else backend.implementation
    if not (torch.is_grad_enabled() or transformed()):
        y, _ = module.forward(x, *weights, *args, places)
        return y
    y = _Eager.apply(module, x, *weights, *args, places)
    return y


def _without_backend(
    x: Tensor, w1: Tensor, index: Tensor, task_offsets: Tensor | None
) -> tuple[Callable[..., Tensor], str] | None:
    """What computes a call if no backend does, and why."""
    if requested("compact_ffn") != "auto" or torch.compiler.is_compiling():
        return None
    if transformed():
        return dense.composed, TORCH_FUNC
    why = None if watched() else dense.reason(x, w1, index, task_offsets)
    return None if why is None else (dense.block, why)


def _casting(x: Tensor, weights: tuple[Tensor | None, ...], *args: Any) -> Backend | None:
    """The backend that takes weights of another dtype than x as they are, if they are that and one does."""
    if all([t is None or t.dtype == x.dtype for t in weights]):
        return None
    wanted = requested("compact_ffn")
    backends = (one for one in BACKENDS if one.casts and wanted in ("auto", one.name))
    return next((one for one in backends if one.refuses(x, *weights, *args) is None), None)


def _cast(weights: tuple[Tensor | None, ...], dtype: torch.dtype) -> Any:
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in weights)
